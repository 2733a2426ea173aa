use super::*;

const TTL: Duration = Duration::from_secs(60);

fn granted(seconds: u64, now: Instant) -> Lease {
    Lease::new(seconds, true, now).unwrap()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn lease_of_zero_seconds_never_expires() {
    assert_eq!(Lease::new(0, true, Instant::now()), None);
}

#[test]
fn longest_lease_does_not_overflow() {
    assert!(Lease::new(u64::MAX, true, Instant::now()).is_some());
}

#[test]
fn renewal_is_due_after_two_thirds_of_the_ttl() {
    let start = Instant::now();
    let schedule = LeaseSchedule::new(granted(60, start));
    assert_eq!(schedule.due_at(false), Some(start + seconds(40)));
    assert!(!schedule.is_due(false, start + seconds(39)));
    assert!(schedule.is_due(false, start + seconds(40)));
}

#[test]
fn fixed_lease_is_due_only_if_reissuable() {
    let start = Instant::now();
    let schedule = LeaseSchedule::new(Lease::new(60, false, start).unwrap());
    assert_eq!(schedule.due_at(false), None);
    assert_eq!(schedule.due_at(true), Some(start + seconds(40)));
}

#[test]
fn renewal_moves_the_next_attempt() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    let renewed_at = start + seconds(40);
    schedule.record_renewal(granted(30, renewed_at));
    assert_eq!(schedule.due_at(false), Some(renewed_at + seconds(20)));
}

#[test]
fn short_renewal_is_enough_only_without_reissue() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    assert!(schedule.extends_enough(&granted(30, start), true, start));
    assert!(!schedule.extends_enough(&granted(29, start), true, start));
    assert!(schedule.extends_enough(&granted(29, start), false, start));
    // Less than the pause between two attempts.
    assert!(!schedule.extends_enough(&granted(1, start), false, start));
    // The first TTL counts, not that of the last renewal.
    schedule.record_renewal(granted(40, start));
    assert!(!schedule.extends_enough(&granted(29, start), true, start));
}

#[test]
fn final_renewal_is_not_followed_by_another() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    schedule.mark_final(granted(10, start));
    assert_eq!(schedule.lease.expires_at, start + seconds(10));
    assert_eq!(schedule.due_at(false), None);
}

#[test]
fn failed_renewal_is_retried_until_the_expiry() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    let mut now = start + seconds(40);
    let mut attempts = Vec::new();
    while now < start + TTL {
        let failure = schedule.record_failure(now);
        assert_eq!(failure.remaining, start + TTL - now);
        now = schedule.due_at(false).unwrap();
        attempts.push((now - start).as_millis());
    }
    assert_eq!(attempts[..2], [45_000, 48_750]);
    assert_eq!(*attempts.last().unwrap(), 60_000);
    let pauses = attempts.windows(2).map(|pair| pair[1] - pair[0]);
    // Only the last attempt comes earlier, at the expiry.
    assert!(pauses.rev().skip(1).all(|pause| pause >= RETRY_PAUSE.as_millis()), "{attempts:?}");
    // After the expiry.
    assert!(schedule.record_failure(now).remaining.is_zero());
    assert_eq!(schedule.due_at(false), Some(now + EXPIRED_RETRY_PAUSE));
}

#[test]
fn failure_after_a_success_is_a_first_one() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    assert!(schedule.record_failure(start).first);
    assert!(!schedule.record_failure(start).first);
    schedule.record_renewal(granted(60, start));
    assert!(schedule.record_failure(start).first);
}

#[test]
fn expiry_is_reported_once() {
    let mut schedule = LeaseSchedule::new(granted(60, Instant::now()));
    assert!(!schedule.is_expiry_reported() && schedule.report_expiry());
    assert!(schedule.is_expiry_reported() && !schedule.report_expiry());
}

#[test]
fn superseded_lease_is_obsolete_at_its_expiry() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    assert!(!schedule.is_obsolete(start + seconds(61)));
    assert_eq!(schedule.expired_for(start + seconds(61)), Some(seconds(1)));
    assert_eq!(schedule.expired_for(start + seconds(59)), None);
    schedule.mark_superseded();
    assert_eq!(schedule.due_at(true), None);
    assert!(!schedule.is_obsolete(start + seconds(59)) && schedule.is_obsolete(start + TTL));
    assert_eq!(schedule.expired_for(start + seconds(61)), None);
}

#[test]
fn lease_ends_with_its_token() {
    let start = Instant::now();
    let mut schedule = LeaseSchedule::new(granted(60, start));
    schedule.end_by(start + seconds(5), start);
    assert_eq!(schedule.lease.expires_at, start + seconds(5));
    assert_eq!((schedule.due_at(false), schedule.due_at(true)), (None, Some(start)));
    schedule.end_by(start + seconds(9), start);
    assert_eq!(schedule.lease.expires_at, start + seconds(5));
}

#[test]
fn lease_is_fresh_until_a_quarter_is_left() {
    let start = Instant::now();
    let schedule = LeaseSchedule::new(granted(60, start));
    assert!(schedule.is_fresh(start + seconds(44)));
    assert!(!schedule.is_fresh(start + seconds(45)));
}
