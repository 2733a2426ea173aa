use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const CANARY: &str = "canary-3c7d19a0+b/e";

fn json(until: &str) -> String {
    let until =
        if until.is_empty() { String::new() } else { format!(r#","Expiration":"{until}""#) };
    format!(r#"{{"AccessKeyId":"ASIA1","SecretAccessKey":"{CANARY}","SessionToken":"t"{until}}}"#)
}

fn endpoint(source: &str, keys: &str) -> Arc<AwsCredentialServer> {
    let spec = SecretSpec {
        delivery: chitin_spec::Delivery::Endpoint,
        ..format!("AWS={source}").parse().unwrap()
    };
    let keys = Keys::from_json(keys.as_bytes()).unwrap();
    let mut count = 0;
    let random = |bytes: &mut [u8]| {
        count += 1;
        bytes.fill(count);
        Ok(())
    };
    Arc::new(AwsCredentialServer::new(spec, keys, None, None, random).unwrap())
}

fn token(endpoint: &AwsCredentialServer) -> String {
    String::from_utf8(endpoint.token.to_bytes().expose().to_vec()).unwrap()
}

/// Sends a request, its head's lines, and gives status, body and what the audit is told.
async fn ask(
    endpoint: &Arc<AwsCredentialServer>,
    lines: &[&str],
) -> (u16, String, Option<Outcome>) {
    let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
    let mut head = lines.join("\r\n");
    if !head.contains("Host:") {
        head.push_str("\r\nHost: 127.0.0.1:9911");
    }
    theirs.write_all(format!("{head}\r\n\r\n").as_bytes()).await.unwrap();
    let asked = async {
        let mut answer = String::new();
        theirs.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let (outcome, answer) = tokio::join!(endpoint.serve(ours), asked);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    (head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap()), body.to_owned(), outcome)
}

const CONTAINER: &str = "GET /credentials/AWS HTTP/1.1";

#[tokio::test]
async fn a_container_s_credentials_are_for_who_has_the_token() {
    let endpoint = endpoint("env:AWS_KEYS", &json(""));
    let right = format!("Authorization: {}", token(&endpoint));
    let (status, body, outcome) = ask(&endpoint, &[CONTAINER, &right]).await;
    assert_eq!((status, outcome), (200, Some(Outcome::Given { trouble: None })));
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&body["SecretAccessKey"], &body["Token"]), (&CANARY.into(), &"t".into()));
    let until = humantime::parse_rfc3339(body["Expiration"].as_str().unwrap()).unwrap();
    let left = until.duration_since(SystemTime::now()).unwrap();
    assert!(left <= SAID && left > SAID - Duration::from_secs(10), "{left:?}");

    let wrong = format!("{right}x");
    let short = &right[..right.len() - 1];
    for lines in
        [&[CONTAINER][..], &[CONTAINER, &wrong], &[CONTAINER, short], &[CONTAINER, &right, &right]]
    {
        let (status, body, outcome) = ask(&endpoint, lines).await;
        assert_eq!(
            (status, outcome),
            (401, Some(Outcome::Refused("the authorization token is not right")))
        );
        assert!(!body.contains("canary"), "{body}");
    }
    // The metadata's token is another thing.
    let lines = ["GET /latest/meta-data/iam/security-credentials/AWS HTTP/1.1", &right];
    assert_eq!(ask(&endpoint, &lines).await.0, 401);
    assert_eq!(ask(&endpoint, &["POST /credentials/AWS HTTP/1.1", &right]).await.0, 405);
    assert_eq!(ask(&endpoint, &["GET /credentials/OTHER HTTP/1.1", &right]).await.0, 404);
    for host in ["evil.example:9911", "127.0.0.1", "127.0.0.1:80"] {
        let host = format!("Host: {host}");
        let (status, _, outcome) = ask(&endpoint, &[CONTAINER, &right, &host]).await;
        assert_eq!(
            (status, outcome),
            (403, Some(Outcome::Refused("the request was for another host")))
        );
    }
    let (status, ..) = ask(&endpoint, &[CONTAINER, &right, "X-Forwarded-For: 1.1.1.1"]).await;
    assert_eq!(status, 403);

    endpoint.revoke();
    let (status, body, outcome) = ask(&endpoint, &[CONTAINER, &right]).await;
    assert_eq!((status, body.as_str()), (403, "the credential was revoked"));
    assert_eq!(outcome, Some(Outcome::Refused("the credential was revoked")));
}

#[tokio::test]
async fn metadata_is_version_2_and_no_other() {
    let endpoint = endpoint("env:AWS_KEYS", &json(""));
    let put = "PUT /latest/api/token HTTP/1.1\r\nContent-Length: 0";
    let ttl = |ttl: &str| format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}");
    for bad in ["0", "21601", "", "-1", "1.5", "6h"] {
        let (status, body, outcome) = ask(&endpoint, &[put, &ttl(bad)]).await;
        assert_eq!(
            (status, body.as_str(), outcome),
            (400, "a token lives for 1 to 21600 seconds", None),
            "{bad}"
        );
    }
    assert_eq!(ask(&endpoint, &[put]).await.0, 400);
    assert_eq!(ask(&endpoint, &["GET /latest/api/token HTTP/1.1", &ttl("60")]).await.0, 405);

    let (status, token, outcome) = ask(&endpoint, &[put, &ttl("21600")]).await;
    assert_eq!((status, token.len(), outcome), (200, 56, None));
    let right = format!("X-aws-ec2-metadata-token: {token}");
    let role = "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1";
    let keys = "GET /latest/meta-data/iam/security-credentials/AWS HTTP/1.1";
    let (status, body, outcome) = ask(&endpoint, &[role, &right]).await;
    assert_eq!((status, body.as_str(), outcome), (200, "AWS", None));
    let (status, body, outcome) = ask(&endpoint, &[keys, &right]).await;
    assert_eq!((status, outcome), (200, Some(Outcome::Given { trouble: None })));
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&body["Code"], &body["AccessKeyId"]), (&"Success".into(), &"ASIA1".into()));
    for path in [
        "/latest/meta-data/iam/security-credentials/OTHER",
        "/latest/meta-data/iam/security-credentialsAWS",
        "/latest/user-data",
    ] {
        assert_eq!(
            ask(&endpoint, &[&format!("GET {path} HTTP/1.1"), &right]).await.0,
            404,
            "{path}"
        );
    }

    // Version 1 has no token.
    let forged = format!("{}A{}", &right[..right.len() - 10], &right[right.len() - 9..]);
    for head in [
        None,
        Some("X-aws-ec2-metadata-token: "),
        Some("X-aws-ec2-metadata-token: AAAA"),
        Some(forged.as_str()),
    ] {
        let lines: Vec<&str> = [keys].into_iter().chain(head).collect();
        let (status, body, outcome) = ask(&endpoint, &lines).await;
        assert!(status == 401 && !body.contains("canary"), "{head:?}: {status} {body}");
        assert!(matches!(outcome, Some(Outcome::Refused(_))), "{outcome:?}");
    }
    // One that is over: the same key would have made it.
    let end = (seconds() - 1).to_be_bytes();
    let over = encode_base64(
        &[&end[..], &endpoint.mac(&end).unwrap().finalize().into_bytes()].concat(),
        false,
    );
    let over = format!("X-aws-ec2-metadata-token: {}", String::from_utf8(over).unwrap());
    assert_eq!(ask(&endpoint, &[keys, &over]).await.0, 401);
}

#[tokio::test]
async fn a_source_is_read_again_when_there_may_be_something_new() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    let endpoint = endpoint(&format!("file:{}", path.display()), &json(""));
    let id = |document: &[u8]| {
        let value: serde_json::Value = serde_json::from_slice(document).unwrap();
        value["AccessKeyId"].as_str().unwrap().to_owned()
    };
    // Not within a second.
    assert_eq!(id(&endpoint.document().await.unwrap().0), "ASIA1");
    endpoint.held.lock().await.read -= PAUSE;
    std::fs::write(&path, json("").replace("ASIA1", "ASIA2")).unwrap();
    assert_eq!(id(&endpoint.document().await.unwrap().0), "ASIA2");
    // What is no pair of keys leaves the last one, and is said.
    std::fs::write(&path, "canary").unwrap();
    endpoint.held.lock().await.read -= PAUSE;
    let (document, trouble) = endpoint.document().await.unwrap();
    assert_eq!(id(&document), "ASIA2");
    assert!(trouble.as_ref().is_some_and(|trouble| !trouble.contains("canary")), "{trouble:?}");
}

#[tokio::test]
async fn keys_whose_time_is_over_are_not_given() {
    let soon = SystemTime::now() + Duration::from_secs(2);
    let soon = humantime::format_rfc3339_seconds(soon).to_string();
    let endpoint = endpoint("exec:exit 3", &json(&soon));
    let right = format!("Authorization: {}", token(&endpoint));
    let (status, body, _) = ask(&endpoint, &[CONTAINER, &right]).await;
    assert!(status == 200 && body.contains(&soon), "{status} {body}");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let (status, body, outcome) = ask(&endpoint, &[CONTAINER, &right]).await;
    assert_eq!(
        (status, body.as_str()),
        (503, "the source of the credential has none that is good")
    );
    assert_eq!(
        outcome,
        Some(Outcome::Failed("secret AWS: `exit 3` failed: exit status: 3".into()))
    );
}

#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let endpoint = endpoint("env:AWS_KEYS", &json(""));
    let (ours, mut theirs) = tokio::io::duplex(1024);
    theirs.write_all(b"GET /cred").await.unwrap();
    let began = Instant::now();
    assert_eq!(endpoint.serve(ours).await, None);
    assert!(began.elapsed() >= REQUEST_LIMIT, "{:?}", began.elapsed());
    // Nor is who says too much.
    let (ours, mut theirs) = tokio::io::duplex(1024);
    let asking = async {
        let _ = theirs.write_all(&[b'a'; 100_000]).await;
        drop(theirs);
    };
    let (outcome, ()) = tokio::join!(endpoint.serve(ours), asking);
    assert_eq!(outcome, None);
    assert!(began.elapsed() < 2 * REQUEST_LIMIT);
}
