//! That the pieces work together and that a figure is refused when the proxy was not in the path. Needs root.

use culvert_lab::{Family, Lab};

use crate::client::{self, Measure};
use crate::datapath::{FAMILIES, Field};
use crate::proxy::Proxy;
use crate::worker::Worker;
use crate::{chart, datapath, enrol, report::Report, runs, ways};

#[test]
fn every_way_leads_to_the_listener_and_is_reported() {
    let field = Field::new("bench-smoke", false).unwrap();
    let mut report = Report::default();
    for family in FAMILIES {
        for path in &field.paths {
            let to = path.target(family);
            let slice = client::slice(&path.client, &path.proxy, to, Measure::Connect, 20);
            assert!(slice.unwrap().rate() > 0.0);
        }
    }
    report.traffic = datapath::measure(&field, 1, &Measure::ALL).unwrap();
    let programs = runs::measure(&field).unwrap();
    let steer = programs.iter().find(|p| p.name == "culvert_steer").unwrap();
    assert!(steer.per_connection >= 1.0, "{steer:?}");
    assert!(programs.iter().all(|p| p.before == p.after), "{programs:?}");
    report.runs = Some(programs);
    assert!(report.text().contains("culvert_steer"));
    assert_eq!(report.json()["traffic"].as_array().unwrap().len(), 6);
    let chart = chart::draw(&report);
    assert!(chart.starts_with("<svg") && chart.ends_with("</svg>\n"));
    assert!(chart.contains("culvert"));
}

#[test]
fn no_figure_without_the_proxy_in_the_path() {
    let lab = Lab::new("bench-refuse").unwrap();
    let pod = lab.pod("open").unwrap();
    let (client, proxy) = (Worker::start(&pod).unwrap(), Proxy::ztunnel(&pod).unwrap());
    // Somebody else answers: the connections work, and never meet the listener that is being measured.
    let other = lab.pod("other").unwrap();
    let answering = Proxy::plain(&other, 80).unwrap();
    for measure in Measure::ALL {
        let to = other.at(Family::V4, 80).unwrap();
        let refused = client::slice(&client, &proxy, to, measure, 3).unwrap_err();
        let text = format!("{refused:#}");
        assert!(text.contains("the proxy was not in the path"), "{text}");
    }
    assert!(answering.seen().accepted > 0);
    // Nobody answers.
    let nobody = client::slice(
        &client,
        &proxy,
        ways::elsewhere(Family::V4),
        Measure::Connect,
        1,
    );
    assert!(nobody.is_err());
    // The same client and listener are counted as soon as it is in the path.
    let to = std::net::SocketAddr::new(Family::V4.loopback(), crate::proxy::PORT);
    client::slice(&client, &proxy, to, Measure::Connect, 3).unwrap();
}

#[test]
fn enrolment_is_timed_for_every_way() {
    for done in enrol::measure(2).unwrap() {
        assert!(done.enrol_all > 0.0 && done.unenrol_all > 0.0, "{done:?}");
        assert_eq!(done.enrol.samples, 1);
    }
}
