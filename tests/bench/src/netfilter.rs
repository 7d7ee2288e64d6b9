//! The rules istio-cni writes into a pod, in the words of iptables and of nftables, and how they are put in and taken out.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Family, Ns, Route, Rule, RuleAction};
use ipnet::IpNet;

/// Which tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Iptables,
    Nftables,
}

/// Both families, as everywhere in a pod.
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const TABLE: u32 = 100;

impl Tool {
    /// Puts the rules into a namespace: one process a family, and the policy route. Called on a thread that is in it.
    pub(crate) fn apply(self, ns: &Ns) -> Result<()> {
        for family in FAMILIES {
            match self {
                Self::Iptables => run(restore(family), &[], &iptables(family))?,
                Self::Nftables => run("nft", &["-f", "-"], &nftables(family))?,
            }
            ns.add_rule(&rule(family))?;
            ns.add_route(&route(family)?)?;
        }
        Ok(())
    }

    /// Takes them out again.
    pub(crate) fn remove(self, ns: &Ns) -> Result<()> {
        for family in FAMILIES {
            match self {
                Self::Iptables => run(
                    restore(family),
                    &[],
                    "*mangle\nCOMMIT\n*nat\nCOMMIT\n*raw\nCOMMIT\n",
                )?,
                Self::Nftables => {
                    let text = format!("delete table {} istio\n", word(family));
                    run("nft", &["-f", "-"], &text)?;
                }
            }
            ns.del_rule(&rule(family))?;
            ns.del_route(&route(family)?)?;
        }
        Ok(())
    }

    /// What the tool calls itself.
    pub(crate) fn version(self) -> Result<String> {
        let program = match self {
            Self::Iptables => restore(Family::V4),
            Self::Nftables => "nft",
        };
        let output = command(program)
            .arg("--version")
            .output()
            .with_context(|| missing(program))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// The kernel's own iptables, not the one that writes nftables: else both tools would measure the same.
fn restore(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-legacy-restore",
        Family::V6 => "ip6tables-legacy-restore",
    }
}

fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn rule(family: Family) -> Rule {
    Rule {
        fwmark: Some((0x111, 0xfff)),
        pref: Some(32764),
        action: RuleAction::Table(TABLE),
        ..Rule::fwmark(family, 0x111, TABLE)
    }
}

fn route(family: Family) -> Result<Route> {
    let all = match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    };
    let to: IpNet = all.parse().context("a prefix")?;
    Ok(Route {
        table: TABLE,
        local: true,
        ..Route::dev(to, "lo")
    })
}

/// Loopback and the address istio-cni gives the kubelet's probes.
fn addresses(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("127.0.0.1/32", "169.254.7.127"),
        Family::V6 => ("::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
    }
}

/// For `iptables-restore`.
fn iptables(family: Family) -> String {
    let (lo, probe) = addresses(family);
    format!(
        "*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -s {probe} -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d {lo} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d {probe} -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d {lo} -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {lo} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {lo} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
COMMIT
"
    )
}

/// For `nft -f`: the same, one table.
fn nftables(family: Family) -> String {
    let ip = word(family);
    let (lo, probe) = addresses(family);
    let lo = lo.split('/').next().unwrap_or(lo);
    format!(
        "table {ip} istio {{
  chain mangle-prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }}
  chain mangle-output {{
    type route hook output priority mangle; policy accept;
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    {ip} saddr {probe} meta l4proto tcp accept
    {ip} daddr != {lo} tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
  }}
  chain nat-output {{
    type nat hook output priority -100; policy accept;
    {ip} daddr {probe} meta l4proto tcp accept
    oifname != \"lo\" meta mark & 0xfff != 0x539 udp dport 53 redirect to :15053
    {ip} daddr != {lo} tcp dport 53 meta mark & 0xfff != 0x539 redirect to :15053
    meta l4proto tcp meta mark & 0xfff == 0x111 accept
    oifname \"lo\" {ip} daddr != {lo} accept
    {ip} daddr != {lo} meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001
  }}
  chain raw-prerouting {{
    type filter hook prerouting priority raw; policy accept;
    udp sport 53 meta mark & 0xfff != 0x539 ct zone set 1
  }}
  chain raw-output {{
    type filter hook output priority raw; policy accept;
    udp dport 53 meta mark & 0xfff == 0x539 ct zone set 1
  }}
}}
"
    )
}

#[expect(
    clippy::disallowed_methods,
    reason = "these tools are what Culvert is compared with"
)]
fn command(program: &str) -> Command {
    Command::new(program)
}

fn missing(program: &str) -> String {
    format!("starting {program}: apt-get install iptables nftables")
}

fn run(program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut child = command(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| missing(program))?;
    child
        .stdin
        .take()
        .context("a pipe that was asked for")?
        .write_all(input.as_bytes())
        .with_context(|| format!("writing rules to {program}"))?;
    let output = child
        .wait_with_output()
        .with_context(|| format!("waiting for {program}"))?;
    ensure!(
        output.status.success(),
        "{program} refused the rules: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
