use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::cache::{READ_PAUSE, STATED_VALIDITY};
use super::*;
use crate::source::SourceError;

const CANARY: &str = "canary-3c7d19a0+b/e";

fn keys_json(expiration: &str) -> String {
    let expiration = match expiration {
        "" => String::new(),
        time => format!(r#","Expiration":"{time}""#),
    };
    format!(
        r#"{{"AccessKeyId":"ASIA1","SecretAccessKey":"{CANARY}","SessionToken":"t"{expiration}}}"#
    )
}

fn server(source: &str, keys: &str) -> Arc<AwsCredentialServer> {
    let spec = SecretSpec {
        delivery: chitin_spec::Delivery::Endpoint,
        ..format!("AWS={source}").parse().unwrap()
    };
    let keys = AwsKeys::from_json(keys.as_bytes()).unwrap();
    let mut count = 0;
    let random = |bytes: &mut [u8]| {
        count += 1;
        bytes.fill(count);
        Ok(())
    };
    Arc::new(AwsCredentialServer::new(spec, keys, None, None, random).unwrap())
}

fn authorization(server: &AwsCredentialServer) -> String {
    let token = String::from_utf8(server.token.to_bytes().expose().to_vec()).unwrap();
    format!("Authorization: {token}")
}

/// Sends the lines of a head. Returns the status, the body and the outcome for the audit log.
async fn send(server: &Arc<AwsCredentialServer>, lines: &[&str]) -> (u16, String, Option<Outcome>) {
    let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
    let mut head = lines.join("\r\n");
    if !head.contains("Host:") {
        head.push_str("\r\nHost: 127.0.0.1:9911");
    }
    theirs.write_all(format!("{head}\r\n\r\n").as_bytes()).await.unwrap();
    let reading = async {
        let mut response = String::new();
        theirs.read_to_string(&mut response).await.unwrap();
        response
    };
    let (outcome, response) = tokio::join!(server.serve(ours), reading);
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or_default();
    (head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap()), body.to_owned(), outcome)
}

fn is_served(outcome: &Option<Outcome>) -> bool {
    matches!(outcome, Some(Outcome::Served { refresh_error: None }))
}

/// Asserts that a request is refused, and that the response holds no key.
#[track_caller]
fn assert_refused((status, body, outcome): (u16, String, Option<Outcome>), expected: Refusal) {
    assert_eq!(status, expected.status().as_u16(), "{body}");
    assert!(
        matches!(outcome, Some(Outcome::Refused(refusal)) if refusal == expected),
        "{outcome:?}"
    );
    assert!(!body.contains("canary"), "{body}");
}

const CONTAINER: &str = "GET /credentials/AWS HTTP/1.1";
const ROLE_KEYS: &str = "GET /latest/meta-data/iam/security-credentials/AWS HTTP/1.1";

#[tokio::test]
async fn container_keys_need_the_authorization_token() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    let right = authorization(&server);
    let (status, body, outcome) = send(&server, &[CONTAINER, &right]).await;
    assert!(status == 200 && is_served(&outcome), "{status} {outcome:?}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&body["SecretAccessKey"], &body["Token"]), (&CANARY.into(), &"t".into()));
    let expires_at = humantime::parse_rfc3339(body["Expiration"].as_str().unwrap()).unwrap();
    let left = expires_at.duration_since(SystemTime::now()).unwrap();
    let stated = STATED_VALIDITY - Duration::from_secs(10)..=STATED_VALIDITY;
    assert!(stated.contains(&left), "{left:?}");

    let wrong = format!("{right}x");
    let short = &right[..right.len() - 1];
    for lines in
        [&[CONTAINER][..], &[CONTAINER, &wrong], &[CONTAINER, short], &[CONTAINER, &right, &right]]
    {
        assert_refused(send(&server, lines).await, Refusal::WrongToken);
    }
    // The token of the other protocol is separate.
    assert_refused(send(&server, &[ROLE_KEYS, &right]).await, Refusal::NoMetadataToken);
    assert_eq!(send(&server, &["POST /credentials/AWS HTTP/1.1", &right]).await.0, 405);
    assert_eq!(send(&server, &["GET /credentials/OTHER HTTP/1.1", &right]).await.0, 404);
}

#[tokio::test]
async fn forwarded_and_rebound_requests_are_refused() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    let right = authorization(&server);
    for host in ["evil.example:9911", "127.0.0.1", "127.0.0.1:80"] {
        let host = format!("Host: {host}");
        assert_refused(send(&server, &[CONTAINER, &right, &host]).await, Refusal::WrongHost);
    }
    let forwarded = [CONTAINER, &right, "X-Forwarded-For: 1.1.1.1"];
    assert_refused(send(&server, &forwarded).await, Refusal::Forwarded);
}

#[tokio::test]
async fn revoked_keys_are_refused() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    server.revoke();
    let request = [CONTAINER, &authorization(&server)];
    assert_refused(send(&server, &request).await, Refusal::Revoked);
}

#[tokio::test]
async fn metadata_is_served_to_version_2_only() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    let put = "PUT /latest/api/token HTTP/1.1\r\nContent-Length: 0";
    let ttl = |ttl: &str| format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}");
    for bad in ["0", "21601", "", "-1", "1.5", "6h"] {
        let (status, _, outcome) = send(&server, &[put, &ttl(bad)]).await;
        assert!(status == 400 && outcome.is_none(), "{bad}: {status} {outcome:?}");
    }
    assert_eq!(send(&server, &[put]).await.0, 400);
    assert_eq!(send(&server, &["GET /latest/api/token HTTP/1.1", &ttl("60")]).await.0, 405);

    let (status, token, outcome) = send(&server, &[put, &ttl("21600")]).await;
    assert!((status, token.len()) == (200, 56) && outcome.is_none(), "{status} {outcome:?}");
    let right = format!("X-aws-ec2-metadata-token: {token}");
    let role = "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1";
    let (status, body, outcome) = send(&server, &[role, &right]).await;
    assert!((status, body.as_str()) == (200, "AWS") && outcome.is_none(), "{status} {body}");
    let (status, body, outcome) = send(&server, &[ROLE_KEYS, &right]).await;
    assert!(status == 200 && is_served(&outcome), "{status} {outcome:?}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&body["Code"], &body["AccessKeyId"]), (&"Success".into(), &"ASIA1".into()));
    for path in [
        "/latest/meta-data/iam/security-credentials/OTHER",
        "/latest/meta-data/iam/security-credentialsAWS",
        "/latest/user-data",
    ] {
        let request = format!("GET {path} HTTP/1.1");
        assert_eq!(send(&server, &[&request, &right]).await.0, 404, "{path}");
    }

    // Version 1 has no token.
    let forged = format!("{}A{}", &right[..right.len() - 10], &right[right.len() - 9..]);
    for head in [
        None,
        Some("X-aws-ec2-metadata-token: "),
        Some("X-aws-ec2-metadata-token: AAAA"),
        Some(forged.as_str()),
    ] {
        let lines: Vec<&str> = [ROLE_KEYS].into_iter().chain(head).collect();
        assert_refused(send(&server, &lines).await, Refusal::NoMetadataToken);
    }
}

#[tokio::test]
async fn expired_metadata_token_is_refused() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    let token = server.token_key.issue_until(imds::seconds_since_epoch() - 1).unwrap();
    let expired = format!("X-aws-ec2-metadata-token: {}", String::from_utf8(token).unwrap());
    assert_refused(send(&server, &[ROLE_KEYS, &expired]).await, Refusal::NoMetadataToken);
}

#[tokio::test]
async fn changed_file_is_read_again_after_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    let server = server(&format!("file:{}", path.display()), &keys_json(""));
    let id = |document: &[u8]| {
        let value: serde_json::Value = serde_json::from_slice(document).unwrap();
        value["AccessKeyId"].as_str().unwrap().to_owned()
    };
    // Within the pause, the file is not read.
    assert_eq!(id(&server.read_document().await.unwrap().0), "ASIA1");
    server.cache.cached.lock().await.read_at -= READ_PAUSE;
    std::fs::write(&path, keys_json("").replace("ASIA1", "ASIA2")).unwrap();
    assert_eq!(id(&server.read_document().await.unwrap().0), "ASIA2");
    // Invalid keys are reported, and the earlier ones remain.
    std::fs::write(&path, "canary").unwrap();
    server.cache.cached.lock().await.read_at -= READ_PAUSE;
    let (document, error) = server.read_document().await.unwrap();
    assert_eq!(id(&document), "ASIA2");
    assert!(matches!(error, Some(SecretError::AwsKeys(_))), "{error:?}");
    assert!(!format!("{error:?}").contains("canary"), "{error:?}");
}

#[tokio::test]
async fn expired_keys_are_not_served() {
    let soon = SystemTime::now() + Duration::from_secs(2);
    let soon = humantime::format_rfc3339_seconds(soon).to_string();
    let server = server("exec:exit 3", &keys_json(&soon));
    let request = [CONTAINER, &authorization(&server)];
    let (status, body, _) = send(&server, &request).await;
    assert!(status == 200 && body.contains(&soon), "{status} {body}");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let (status, body, outcome) = send(&server, &request).await;
    assert_eq!((status, body.as_str()), (503, "the source of the credential has no valid keys"));
    assert!(
        matches!(
            &outcome,
            Some(Outcome::Failed(SecretError::Source(SourceError::CommandFailed { .. })))
        ),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn silent_and_endless_requests_are_ended() {
    let server = server("env:AWS_KEYS", &keys_json(""));
    let (ours, mut theirs) = tokio::io::duplex(1024);
    theirs.write_all(b"GET /cred").await.unwrap();
    let began = Instant::now();
    assert!(server.serve(ours).await.is_none());
    assert!(began.elapsed() >= REQUEST_LIMIT, "{:?}", began.elapsed());
    let (ours, mut theirs) = tokio::io::duplex(1024);
    let sending = async {
        let _ = theirs.write_all(&[b'a'; 100_000]).await;
        drop(theirs);
    };
    let (outcome, ()) = tokio::join!(server.serve(ours), sending);
    assert!(outcome.is_none(), "{outcome:?}");
    assert!(began.elapsed() < 2 * REQUEST_LIMIT);
}
