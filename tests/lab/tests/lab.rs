//! The lab itself: what it builds works, labs do not see each other, and nothing is left of one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use culvert_lab::{Family, Lab};

#[test]
fn pods_reach_each_other_and_the_node_and_the_outside() {
    let lab = Lab::new("reach").unwrap();
    let (a, b, outside) = (
        lab.pod("a").unwrap(),
        lab.pod("b").unwrap(),
        lab.outside().unwrap(),
    );
    for family in Family::BOTH {
        for (server, client) in [
            (&a, &b),
            (&b, lab.node()),
            (lab.node(), &a),
            (&outside, &a),
            (&a, &outside),
        ] {
            let at = server.at(family, 7000).unwrap();
            let listener = server.run(|| TcpListener::bind(at)).unwrap();
            let expected = client.run(|| {
                let mut stream = TcpStream::connect(at).unwrap();
                stream.write_all(b"x").unwrap();
                stream.local_addr().unwrap()
            });
            let (mut stream, peer) = listener.accept().unwrap();
            assert_eq!(peer, expected);
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        }
    }
}

#[test]
fn panics_go_on_in_the_caller() {
    let lab = Lab::new("panic").unwrap();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        lab.node().run(|| panic!("on purpose"))
    }));
    assert_eq!(
        caught.unwrap_err().downcast_ref::<&str>(),
        Some(&"on purpose")
    );
}
