//! The requests in which a placeholder is replaced: headers that carry keys, and what a scope adds.

use chitin_spec::KEY_HEADERS;
use http::StatusCode;

use super::super::blocked::{BlockReason, Location};
use super::super::*;
use super::connection::*;

async fn connect_with(scope: ProxyScope, h2: bool) -> TestConnection {
    let proxy = Arc::new(proxy(vec![("TOKEN", scope, VALUE)]).unwrap());
    connect(proxy, "api.test", "api.test", h2, echo_handler()).await.unwrap()
}

#[tokio::test]
async fn placeholder_is_replaced_in_key_headers_only() {
    for h2 in [false, true] {
        let mut connection = connect_with(scope(&["api.test:443"], false, false), h2).await;
        let token = connection.placeholder("TOKEN");
        for name in KEY_HEADERS {
            let (status, ..) = connection.request("/", &[(name, &token)], "").await;
            assert_eq!((status, connection.last_request().header(name)), (StatusCode::OK, VALUE));
        }
        for name in ["x-goog-meta-note", "x-amz-meta-note", "cookie", "user-agent", "x-custom"] {
            let mut connection = connect_with(scope(&["api.test:443"], false, false), h2).await;
            let (status, _, body) = connection.request("/", &[(name, &token)], "").await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{name}");
            assert!(body.contains(&format!("--secret-header TOKEN={name}")), "{body}");
            connection.assert_blocked(|reason| {
                matches!(reason, BlockReason::Misplaced { location: Location::Header(found), .. }
                    if found == name)
            });
        }
    }
}

#[tokio::test]
async fn listed_header_is_replaced_in_any_case() {
    for h2 in [false, true] {
        let headers = vec!["X-Custom".parse().unwrap()];
        let scope = ProxyScope { headers, ..scope(&["api.test:443"], false, false) };
        let mut connection = connect_with(scope, h2).await;
        let token = connection.placeholder("TOKEN");
        let name = if h2 { "x-custom" } else { "X-CUSTOM" };
        let (status, ..) = connection.request("/", &[(name, &token)], "").await;
        assert_eq!((status, connection.last_request().header("x-custom")), (StatusCode::OK, VALUE));
    }
}

#[tokio::test]
async fn method_and_path_restrict_the_replacement() {
    for h2 in [false, true] {
        let restricted = ProxyScope {
            path_prefix: Some("/v1/items".parse().unwrap()),
            methods: vec!["GET".parse().unwrap()],
            ..scope(&["api.test:443"], true, false)
        };
        let mut connection = connect_with(restricted.clone(), h2).await;
        let token = connection.placeholder("TOKEN");
        let header = [("authorization", token.as_str())];
        let (status, ..) = connection.request("/v1/items/1?a=b", &header, "").await;
        assert_eq!(
            (status, connection.last_request().header("authorization")),
            (StatusCode::OK, VALUE)
        );
        // A request without the placeholder is not restricted.
        assert_eq!(connection.request("/v2", &[], "body").await.0, StatusCode::OK);
        for path in ["/v1", "/v1/itemsx", "/v1/items/../keys", "/v1/items/%2e%2e/keys", "/"] {
            let mut connection = connect_with(restricted.clone(), h2).await;
            let (status, ..) = connection.request(path, &header, "").await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
            connection.assert_blocked(|reason| matches!(reason, BlockReason::WrongPath { .. }));
        }
        let mut connection = connect_with(restricted.clone(), h2).await;
        let (status, ..) = connection.request("/v1/items", &header, "a POST").await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        connection.assert_blocked(|reason| matches!(reason, BlockReason::WrongMethod { .. }));
        let mut connection = connect_with(restricted, h2).await;
        let (status, ..) = connection.request(&format!("/v2?key={token}"), &[], "").await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        connection.assert_blocked(|reason| matches!(reason, BlockReason::WrongPath { .. }));
    }
}
