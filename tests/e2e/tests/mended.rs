//! Programs of the node that somebody took away are back within one look at everything, counted and said.

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::dns::{Resolver, ask};
use culvert_e2e::{bpf, eventually, governed::Governed, traffic::talk};
use culvert_lab::{Capture, Family, Ns, Server};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How often the agent says it put the node's programs back.
fn repairs(node: &Governed) -> Result<u64> {
    let metrics = node.lab.node().run(|| -> Result<String> {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect("127.0.0.1:15014")?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nhost: node\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("culvert_repairs_total") && line.contains("node_programs"));
    line.and_then(|line| line.rsplit(' ').next())
        .map_or(Ok(0), |count| count.parse().context("a count"))
}

fn whole(node: &Governed, pods: [&Ns; 2]) -> Result<()> {
    for pod in pods {
        node.expect_state(pod, "enrolled")?;
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    Ok(())
}

#[test]
fn a_program_of_the_node_that_was_taken_away_comes_back() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("mended-node", ["a", "b"])?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let links = node.lab.bpffs().join("links");
    let connect = links.join("culvert_connect");
    let sockopt = links.join("culvert_sockopt");
    let steer = bpf::Map::pinned(&node.lab.bpffs().join("maps/STEER"))?;
    let ways: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("its pin is removed", &|| {
            Ok(std::fs::remove_file(&connect)?)
        }),
        ("it is detached by force", &|| bpf::detach_link(&connect)),
        ("another one is detached", &|| bpf::detach_link(&sockopt)),
        ("the node's one steering program is gone", &|| {
            steer.delete(&0_u32.to_ne_bytes())
        }),
    ];
    for (what, harm) in ways {
        let before = repairs(&node)?;
        harm().context(what)?;
        eventually(what, || Ok(repairs(&node)? == before + 1))?;
        whole(&node, [&a, &b]).context(what)?;
        let carried = node.stat(&a, "outbound_accepts")?;
        let wire = Capture::outside(node.lab.node(), &a)?;
        talk(&a, server.addr()).context(what)?;
        ensure!(node.stat(&a, "outbound_accepts")? == carried + 1, "{what}");
        ensure!(!wire.contains(b"a word")?, "{what}: plaintext on the wire");
    }
    Ok(())
}

#[test]
fn a_program_for_lookups_that_was_taken_away_comes_back() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("mended-dns", ["a", "b"])?;
    let outside = node.lab.outside()?;
    let resolver = Resolver::start(
        &outside,
        outside.ip(Family::V4)?,
        std::net::Ipv4Addr::new(192, 0, 2, 2),
    )?;
    let asked = || -> Result<u64> {
        let counters = &node.show(&a)?["counters"];
        counters["to_dns_udp4"].as_u64().context("a counter")
    };
    // What ztunnel answers does not matter here, but that it was asked.
    let captured = || -> Result<bool> {
        let before = asked()?;
        drop(ask(&a, resolver.addr(), "some.name"));
        Ok(asked()? > before)
    };
    ensure!(captured()?, "lookups are not captured to begin with");
    let links = node.lab.bpffs().join("links");
    for (name, by_force) in [
        ("culvert_dns_connect4", true),
        ("culvert_dns_sendmsg4", false),
        ("culvert_dns_recvmsg6", true),
    ] {
        let before = repairs(&node)?;
        let pin = links.join(name);
        if by_force {
            bpf::detach_link(&pin)?;
        } else {
            std::fs::remove_file(&pin)?;
        }
        eventually(name, || Ok(repairs(&node)? == before + 1))?;
        ensure!(captured()?, "{name} is not back");
        whole(&node, [&a, &b])?;
    }
    ensure!(repairs(&node)? == 3, "repaired what was not broken");
    Ok(())
}

/// Something else mounted over the pins, for as long as this lives.
struct Hidden<'a>(&'a std::path::Path);

impl<'a> Hidden<'a> {
    fn new(dir: &'a std::path::Path) -> Result<Self> {
        let none = None::<&str>;
        mount(Some("none"), dir, Some("tmpfs"), MsFlags::empty(), none)?;
        Ok(Self(dir))
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        let _gone = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn without_bpffs_the_plugins_status_fails_until_it_is_back() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("mended-bpffs", ["a", "b"])?;
    let broken = || -> Result<serde_json::Value> {
        Ok(node.agent()?.get("/v1/cni/status")?["broken"].clone())
    };
    ensure!(broken()?.is_null(), "{}", broken()?);
    // Late or away is not broken.
    node.ztunnel()?.kill()?;
    let bpffs = node.lab.bpffs().to_path_buf();
    let hidden = Hidden::new(&bpffs)?;
    let since = std::time::Instant::now();
    eventually("the plugin is told", || Ok(!broken()?.is_null()))?;
    ensure!(
        since.elapsed() >= std::time::Duration::from_secs(10),
        "a fault of a moment takes no node out of service"
    );
    let said = broken()?.to_string();
    ensure!(said.contains("no bpffs is mounted there"), "{said}");
    drop(hidden);
    eventually("it is whole again", || Ok(broken()?.is_null()))?;
    for pod in [&a, &b] {
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    Ok(())
}
