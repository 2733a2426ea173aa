use super::*;

#[test]
fn events_have_a_fixed_wire_form() {
    let ended = Event::Ended {
        reason: EndReason::Reset,
        detail: None,
        log: "x".into(),
        faults: 0,
        fault: None,
    };
    let jail = Jail { uid: Some(8), without: vec!["x".into()], ..Jail::default() };
    for (event, json) in [
        (Event::Prepared, r#"{"event":"prepared"}"#),
        (Event::Entered { at_ns: 7, jail: None }, r#"{"event":"entered","at_ns":7}"#),
        (
            Event::Entered { at_ns: 7, jail: Some(jail) },
            concat!(
                r#"{"event":"entered","at_ns":7,"jail":{"uid":8,"user":"caller","cgroup":null,"#,
                r#""without":["x"],"speculation":{"core_scheduling":"unavailable","#,
                r#""store_bypass":"unavailable","indirect_branch":"unavailable"}}}"#
            ),
        ),
        (Event::Frozen, r#"{"event":"frozen"}"#),
        (
            Event::Saved { memory_bytes: 1, state_bytes: 2 },
            r#"{"event":"saved","memory_bytes":1,"state_bytes":2}"#,
        ),
        (
            Event::Recorded { written: 1, read: 2, image: 3 },
            r#"{"event":"recorded","written":1,"read":2,"image":3}"#,
        ),
        (ended, r#"{"event":"ended","reason":"reset","detail":null,"log":"x","faults":0}"#),
        (
            Event::Ended {
                reason: EndReason::Fault,
                detail: None,
                log: String::new(),
                faults: 2,
                fault: Some(GuestFault::UsedRing { queue: 1 }),
            },
            concat!(
                r#"{"event":"ended","reason":"fault","detail":null,"log":"","faults":2,"#,
                r#""fault":{"used_ring":{"queue":1}}}"#
            ),
        ),
        (
            Event::Failed { code: FailureCode::KvmPermission, error: "no".into() },
            r#"{"event":"failed","code":"kvm_permission","error":"no"}"#,
        ),
    ] {
        assert_eq!(serde_json::to_string(&event).unwrap(), json);
        assert_eq!(serde_json::from_str::<Event>(json).unwrap(), event);
    }
}
