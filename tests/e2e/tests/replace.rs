//! Programs replaced under load: no connection is lost, and none goes past ztunnel.

use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{LONG, Mesh, bpf, eventually, traffic::servers};
use culvert_lab::{Lab, Ns, Stop, roundtrip};

/// Makes the next `load` believe that what is loaded comes from another object.
fn age_programs(lab: &Lab) -> Result<()> {
    let config = bpf::Map::pinned(&lab.bpffs().join("maps/CONFIG"))?;
    let key = 0_u32.to_ne_bytes();
    let mut value = config.get(&key)?;
    // The object's number is the last field.
    let at = value.len() - 8;
    value[at..].fill(0);
    config.set(&key, &value)
}

#[test]
fn programs_replaced_under_load_lose_no_connection() {
    const REPLACEMENTS: usize = 10;
    const CONNECTIONS: usize = 3000;
    let mesh = Mesh::new("replace").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none", "--hold", "0"])
        .unwrap();
    let far = servers(&outside, 8080).unwrap();
    let own = servers(&pod, 8081).unwrap();
    let kinds: Vec<(&Ns, SocketAddr)> = far
        .iter()
        .map(|(_, s)| (&pod, s.addr()))
        .chain(own.iter().map(|(_, s)| (&outside, s.addr())))
        .chain(own.iter().map(|(_, s)| (&pod, s.addr())))
        .collect();
    let before = mesh.ztunnel.pod_stats("a").unwrap();
    let stop = AtomicBool::new(false);
    let done: Vec<AtomicUsize> = kinds.iter().map(|_| AtomicUsize::new(0)).collect();
    let errors = Mutex::new(Vec::new());
    let total = || -> usize { done.iter().map(|d| d.load(Ordering::SeqCst)).sum() };
    let started = Instant::now();
    let replaced = std::thread::scope(|scope| -> Result<usize> {
        for ((from, to), done) in kinds.iter().zip(&done) {
            let (stop, errors) = (&stop, &errors);
            scope.spawn(move || {
                from.run(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let one = || -> Result<()> {
                            let stream = TcpStream::connect_timeout(to, LONG)?;
                            stream.set_read_timeout(Some(LONG))?;
                            roundtrip(&stream, b"1")?;
                            Ok(())
                        };
                        match one() {
                            Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                            Err(error) => errors
                                .lock()
                                .unwrap_or_else(std::sync::PoisonError::into_inner)
                                .push(format!("{} to {to}: {error:?}", from.name())),
                        }
                    }
                });
            });
        }
        let replace = || -> Result<usize> {
            let mut replaced = 0;
            while replaced < REPLACEMENTS || total() < CONNECTIONS {
                let seen = total();
                age_programs(&mesh.lab)?;
                let report = mesh.lab.culvert(&["-o", "json", "load"])?.ok()?.json()?;
                let programs = report["programs"].as_array().context("no programs")?;
                let new = programs
                    .iter()
                    .filter(|p| p["action"] == "replaced")
                    .count();
                ensure!(new >= 3, "not replaced: {report}");
                replaced += 1;
                ensure!(started.elapsed() < Duration::from_secs(60), "too slow");
                eventually("connections go on", || Ok(total() > seen + kinds.len()))?;
            }
            Ok(replaced)
        };
        let _at_the_end = Stop::at_the_end(&stop);
        replace()
    });
    let took = started.elapsed();
    let errors = errors.into_inner().unwrap();
    assert!(
        errors.is_empty(),
        "{} of {} lost, first {:?}",
        errors.len(),
        total() + errors.len(),
        errors.first()
    );
    println!(
        "{} connections in {took:?} ({:.0} a second) while programs were replaced {} times",
        total(),
        total() as f64 / took.as_secs_f64(),
        replaced.unwrap()
    );
    // Not one went past ztunnel either.
    let after = mesh.ztunnel.pod_stats("a").unwrap();
    let count = |n: usize| done[n].load(Ordering::SeqCst) as u64;
    for (name, expected) in [
        ("outbound_accepts", count(0) + count(1)),
        ("inbound_accepts", count(2) + count(3)),
    ] {
        let grown = after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
        assert_eq!(grown, expected, "{name}");
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}
