//! A server of the Vault API with secrets: OpenBao, which `cargo xtask openbao` fetches. Each test
//! starts its own server on a loopback port.
//!
//! If `VAULT_ADDR` is set, with a root token in `VAULT_TOKEN`, the tests use that server instead,
//! except those of [`VaultServer::start_private`]. The server must be on this host, because one of
//! its engines connects to the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::tls;

/// Returns the path of the server program.
fn program_path() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/artifacts/bao");
    assert!(path.exists(), "no {}: `cargo xtask openbao` fetches it", path.display());
    path
}

/// A server with secrets.
pub(super) struct VaultServer {
    address: String,
    root_token: String,
    unseal_key: String,
    /// The namespace of all requests.
    namespace: Option<String>,
    /// The mount of a KV 1 engine with the secrets `creds` and `plain`.
    pub kv: String,
    http: reqwest::Client,
    process: Option<Child>,
    dir: tempfile::TempDir,
}

impl Drop for VaultServer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl VaultServer {
    /// Starts OpenBao, or connects to the server that the environment names.
    pub async fn start() -> VaultServer {
        let Ok(address) = std::env::var("VAULT_ADDR") else { return Self::start_private().await };
        let mut server = VaultServer::new(address);
        server.root_token = std::env::var("VAULT_TOKEN")
            .expect("VAULT_TOKEN is a root token, in addition to VAULT_ADDR");
        server.write_secrets().await;
        server
    }

    /// Starts OpenBao in any case: for tests that seal or kill the server, or use namespaces, which
    /// some editions of Vault lack.
    pub async fn start_private() -> VaultServer {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = VaultServer::new(format!("http://127.0.0.1:{port}"));
        let listener =
            json!({ "tcp": { "address": format!("127.0.0.1:{port}"), "tls_disable": "true" } });
        let config = json!({ "storage": { "inmem": {} }, "listener": listener });
        let path = server.dir.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let log = std::fs::File::create(server.dir.path().join("log")).unwrap();
        let process = Command::new(program_path())
            .args(["server", "--config"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        server.process = Some(process);
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.send("GET", "sys/seal-status", None).await.is_err() {
            let ended = server.process.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "OpenBao does not start ({ended:?}): {}",
                std::fs::read_to_string(server.dir.path().join("log")).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let init = server
            .expect_ok("PUT", "sys/init", json!({ "secret_shares": 1, "secret_threshold": 1 }))
            .await;
        server.root_token = init["root_token"].as_str().unwrap().into();
        server.unseal_key = init["keys"][0].as_str().unwrap().into();
        server.unseal().await;
        server.write_secrets().await;
        server
    }

    fn new(address: String) -> VaultServer {
        let tls = tls::client_config(tls::system_roots());
        VaultServer {
            address,
            root_token: String::new(),
            unseal_key: String::new(),
            namespace: None,
            kv: String::new(),
            http: reqwest::Client::builder()
                .tls_backend_preconfigured(tls)
                .no_proxy()
                .build()
                .unwrap(),
            process: None,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    async fn write_secrets(&mut self) {
        self.kv = self.mount_engine("kv", json!({ "version": "1" })).await;
        let kv = &self.kv;
        let secret = json!({ "api_token": CANARY, "port": 8080, "nested": { "no": "text" } });
        self.expect_ok("POST", &format!("{kv}/creds"), secret).await;
        self.expect_ok(
            "POST",
            &format!("{kv}/plain"),
            json!({ "api_token": CANARY, "user": "agent" }),
        )
        .await;
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub async fn unseal(&self) {
        self.expect_ok("PUT", "sys/unseal", json!({ "key": self.unseal_key })).await;
    }

    /// Mounts an engine. Returns its mount path.
    pub async fn mount_engine(&self, engine: &str, options: Value) -> String {
        let mount = unique_name(engine);
        let body = json!({ "type": engine, "options": options });
        self.expect_ok("POST", &format!("sys/mounts/{mount}"), body).await;
        mount
    }

    /// Makes a namespace below the current one, and switches to it, with secrets of its own.
    pub async fn enter_namespace(&mut self, name: &str) {
        self.expect_ok("POST", &format!("sys/namespaces/{name}"), json!({})).await;
        self.namespace = Some(match &self.namespace {
            Some(outer) => format!("{outer}/{name}"),
            None => name.to_owned(),
        });
        self.write_secrets().await;
    }

    /// Makes a role that may read `creds`, and nothing else.
    pub async fn create_reader_role(&self, options: Value) -> VaultConfig {
        self.create_role(&[&format!("{}/creds", self.kv)], options).await
    }

    /// Makes a role with these options whose tokens may read these paths. Returns its login.
    pub async fn create_role(&self, paths: &[&str], options: Value) -> VaultConfig {
        let mount = unique_name("approle");
        let rule = |path: &&str| format!("path \"{path}\" {{ capabilities = [\"read\"] }}\n");
        let policy: String = paths.iter().map(rule).collect();
        let policy = json!({ "policy": policy });
        self.expect_ok("POST", &format!("sys/policies/acl/{mount}"), policy).await;
        self.expect_ok("POST", &format!("sys/auth/{mount}"), json!({ "type": "approle" })).await;
        let mut role =
            json!({ "token_policies": [mount], "token_max_ttl": 3600, "bind_secret_id": true });
        role.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let path = format!("auth/{mount}/role/agents");
        self.expect_ok("POST", &path, role).await;
        let role_id = self.send("GET", &format!("{path}/role-id"), None).await.unwrap().1;
        let secret_id = self.expect_ok("POST", &format!("{path}/secret-id"), json!({})).await;
        let text = |value: &Value| Zeroizing::new(value.as_str().unwrap().to_owned());
        self.config_with(VaultLogin::AppRole {
            mount,
            role_id: text(&role_id["data"]["role_id"]),
            secret_id: SecretId::Plain(text(&secret_id["data"]["secret_id"])),
        })
    }

    /// Returns the login with the root token, which belongs to the caller.
    pub fn root_login(&self) -> VaultConfig {
        self.config_with(VaultLogin::Token(Zeroizing::new(self.root_token.clone())))
    }

    fn config_with(&self, login: VaultLogin) -> VaultConfig {
        VaultConfig {
            address: self.address.clone(),
            login,
            namespace: self.namespace.clone(),
            ca: None,
        }
    }

    /// Counts the valid tokens of a role.
    pub async fn count_tokens(&self, config: &VaultConfig) -> usize {
        let VaultLogin::AppRole { mount, .. } = &config.login else { panic!("no role") };
        let path = format!("sys/leases/lookup/auth/{mount}/login?list=true");
        match self.send("GET", &path, None).await.unwrap() {
            (200, answer) => answer["data"]["keys"].as_array().unwrap().len(),
            (404, _) => 0,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a request with the root token that must succeed. Returns the response.
    pub async fn expect_ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (code, answer) = self.send(method, path, Some(body)).await.unwrap();
        assert!((200..300).contains(&code), "{method} {path}: {code} {answer}");
        answer
    }

    /// Sends a request with the root token. Returns the status and the response.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), reqwest::Error> {
        let response = self.build_request(method, path, body).send().await?;
        let code = response.status().as_u16();
        Ok((code, serde_json::from_slice(&response.bytes().await?).unwrap_or_default()))
    }

    fn build_request(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/{path}", self.address);
        let mut request = self
            .http
            .request(method.parse().unwrap(), url)
            .header("X-Vault-Token", &self.root_token);
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        match body {
            Some(body) => request.body(body.to_string()),
            None => request,
        }
    }

    /// Returns a login with the same role, and a wrapped secret id that is valid for a minute.
    pub async fn wrap_secret_id(&self, config: &VaultConfig) -> VaultConfig {
        let VaultLogin::AppRole { mount, role_id, .. } = config.login.clone() else {
            panic!("no role")
        };
        let path = format!("auth/{mount}/role/agents/secret-id");
        let request =
            self.build_request("POST", &path, Some(json!({}))).header("X-Vault-Wrap-TTL", "60");
        let answer = request.send().await.unwrap().bytes().await.unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let token = Zeroizing::new(answer["wrap_info"]["token"].as_str().unwrap().to_owned());
        self.config_with(VaultLogin::AppRole {
            mount,
            role_id,
            secret_id: SecretId::Wrapped(token),
        })
    }

    pub fn source(&self, rest: &str) -> VaultSource {
        format!("vault://{}/{rest}", self.kv).parse().unwrap()
    }

    pub fn secret(&self, name: &str, rest: &str) -> SecretSpec {
        format!("{name}=vault://{}/{rest}", self.kv).parse().unwrap()
    }
}

/// Returns a unique name, also for a server with the data of earlier runs.
fn unique_name(prefix: &str) -> String {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    format!("chitin-{now:x}-{prefix}")
}
