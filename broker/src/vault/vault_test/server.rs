//! A real server of the Vault API, with secrets in it: OpenBao, which `cargo xtask openbao` fetches. Each test starts its own on a
//! loopback port.
//!
//! Set `VAULT_ADDR`, and a root token in `VAULT_TOKEN`, and the same tests run against a real Vault, in the place of OpenBao, but
//! for those of [`Server::start_own`]. It has to be on this host, because one of its engines asks back.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::*;

/// The server's program.
fn binary() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/artifacts/bao");
    assert!(path.exists(), "no {}: `cargo xtask openbao` fetches it", path.display());
    path
}

/// A server with secrets.
pub(super) struct Server {
    address: String,
    root: String,
    /// To unseal it with.
    key: String,
    /// Where everything is from now on.
    namespace: Option<String>,
    /// The mount of KV 1, with `creds` and `plain`.
    pub kv: String,
    http: reqwest::Client,
    process: Option<Child>,
    dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    /// In the place of OpenBao, the one that the environment names.
    pub async fn start() -> Server {
        let Ok(address) = std::env::var("VAULT_ADDR") else { return Self::start_own().await };
        let mut server = Server::new(address);
        server.root =
            std::env::var("VAULT_TOKEN").expect("VAULT_TOKEN of a root token, beside VAULT_ADDR");
        server.fill().await;
        server
    }

    /// One that nobody else has, also if the environment names one: to be sealed and killed, or for namespaces, which not every
    /// Vault has.
    pub async fn start_own() -> Server {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Server::new(format!("http://127.0.0.1:{port}"));
        let listener =
            json!({ "tcp": { "address": format!("127.0.0.1:{port}"), "tls_disable": "true" } });
        let config = json!({ "storage": { "inmem": {} }, "listener": listener });
        let path = server.dir.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let log = std::fs::File::create(server.dir.path().join("log")).unwrap();
        let process = Command::new(binary())
            .args(["server", "--config"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        server.process = Some(process);
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.ask("GET", "sys/seal-status", None).await.is_err() {
            let ended = server.process.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "OpenBao does not come up ({ended:?}): {}",
                std::fs::read_to_string(server.dir.path().join("log")).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let init = server
            .admin("PUT", "sys/init", json!({ "secret_shares": 1, "secret_threshold": 1 }))
            .await;
        server.root = init["root_token"].as_str().unwrap().into();
        server.key = init["keys"][0].as_str().unwrap().into();
        server.unseal().await;
        server.fill().await;
        server
    }

    fn new(address: String) -> Server {
        let tls = tls::client_config(tls::system_roots());
        Server {
            address,
            root: String::new(),
            key: String::new(),
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

    async fn fill(&mut self) {
        self.kv = self.mount("kv", json!({ "version": "1" })).await;
        let kv = &self.kv;
        let secret = json!({ "api_token": CANARY, "port": 8080, "nested": { "no": "text" } });
        self.admin("POST", &format!("{kv}/creds"), secret).await;
        self.admin("POST", &format!("{kv}/plain"), json!({ "api_token": CANARY, "user": "agent" }))
            .await;
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub async fn unseal(&self) {
        self.admin("PUT", "sys/unseal", json!({ "key": self.key })).await;
    }

    /// Mounts an engine.
    pub async fn mount(&self, engine: &str, options: Value) -> String {
        let mount = unique(engine);
        let body = json!({ "type": engine, "options": options });
        self.admin("POST", &format!("sys/mounts/{mount}"), body).await;
        mount
    }

    /// Makes a namespace in the one where we are, and goes there, with other secrets.
    pub async fn enter(&mut self, name: &str) {
        self.admin("POST", &format!("sys/namespaces/{name}"), json!({})).await;
        self.namespace = Some(match &self.namespace {
            Some(outer) => format!("{outer}/{name}"),
            None => name.to_owned(),
        });
        self.fill().await;
    }

    /// Takes a role that may read `creds`, and nothing else.
    pub async fn reader(&self, terms: Value) -> VaultConfig {
        self.role(&[&format!("{}/creds", self.kv)], terms).await
    }

    /// Makes a role whose tokens may read these paths, on terms, and takes it.
    pub async fn role(&self, paths: &[&str], terms: Value) -> VaultConfig {
        let mount = unique("approle");
        let rule = |path: &&str| format!("path \"{path}\" {{ capabilities = [\"read\"] }}\n");
        let policy: String = paths.iter().map(rule).collect();
        let policy = json!({ "policy": policy });
        self.admin("POST", &format!("sys/policies/acl/{mount}"), policy).await;
        self.admin("POST", &format!("sys/auth/{mount}"), json!({ "type": "approle" })).await;
        let mut role =
            json!({ "token_policies": [mount], "token_max_ttl": 3600, "bind_secret_id": true });
        role.as_object_mut().unwrap().extend(terms.as_object().unwrap().clone());
        let path = format!("auth/{mount}/role/agents");
        self.admin("POST", &path, role).await;
        let role_id = self.ask("GET", &format!("{path}/role-id"), None).await.unwrap().1;
        let secret_id = self.admin("POST", &format!("{path}/secret-id"), json!({})).await;
        let text = |value: &Value| Zeroizing::new(value.as_str().unwrap().to_owned());
        self.config(VaultLogin::AppRole {
            mount,
            role_id: text(&role_id["data"]["role_id"]),
            secret_id: SecretId::Plain(text(&secret_id["data"]["secret_id"])),
        })
    }

    /// Somebody's token that may do everything.
    pub fn root(&self) -> VaultConfig {
        self.config(VaultLogin::Token(Zeroizing::new(self.root.clone())))
    }

    fn config(&self, login: VaultLogin) -> VaultConfig {
        VaultConfig {
            address: self.address.clone(),
            login,
            namespace: self.namespace.clone(),
            ca: None,
        }
    }

    /// How many tokens a role has that are good.
    pub async fn tokens(&self, config: &VaultConfig) -> usize {
        let VaultLogin::AppRole { mount, .. } = &config.login else { panic!("no role") };
        let path = format!("sys/leases/lookup/auth/{mount}/login?list=true");
        match self.ask("GET", &path, None).await.unwrap() {
            (200, answer) => answer["data"]["keys"].as_array().unwrap().len(),
            (404, _) => 0,
            other => panic!("{other:?}"),
        }
    }

    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let (code, answer) = self.ask(method, path, Some(body)).await.unwrap();
        assert!((200..300).contains(&code), "{method} {path}: {code} {answer}");
        answer
    }

    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), reqwest::Error> {
        let response = self.request(method, path, body).send().await?;
        let code = response.status().as_u16();
        Ok((code, serde_json::from_slice(&response.bytes().await?).unwrap_or_default()))
    }

    fn request(&self, method: &str, path: &str, body: Option<Value>) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/{path}", self.address);
        let mut request =
            self.http.request(method.parse().unwrap(), url).header("X-Vault-Token", &self.root);
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        match body {
            Some(body) => request.body(body.to_string()),
            None => request,
        }
    }

    /// The same role, with another secret id, in a token that is good for a minute.
    pub async fn wrapped(&self, config: &VaultConfig) -> VaultConfig {
        let VaultLogin::AppRole { mount, role_id, .. } = config.login.clone() else {
            panic!("no role")
        };
        let path = format!("auth/{mount}/role/agents/secret-id");
        let request = self.request("POST", &path, Some(json!({}))).header("X-Vault-Wrap-TTL", "60");
        let answer = request.send().await.unwrap().bytes().await.unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let token = Zeroizing::new(answer["wrap_info"]["token"].as_str().unwrap().to_owned());
        self.config(VaultLogin::AppRole { mount, role_id, secret_id: SecretId::Wrapped(token) })
    }

    pub fn source(&self, rest: &str) -> VaultSource {
        format!("vault://{}/{rest}", self.kv).parse().unwrap()
    }

    pub fn secret(&self, name: &str, rest: &str) -> SecretSpec {
        format!("{name}=vault://{}/{rest}", self.kv).parse().unwrap()
    }
}

/// A name that nothing else has, also on a server that keeps what others before us have left.
fn unique(what: &str) -> String {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    format!("chitin-{now:x}-{what}")
}
