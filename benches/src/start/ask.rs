use std::str::FromStr;

use chitin::Sandbox;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::BenchError;

/// A request to a server in the sandbox, `PORT=TEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    port: u16,
    text: String,
}

impl Ask {
    /// Sends the text and reads the answer to its end.
    pub async fn send_to(&self, sandbox: &Sandbox) -> Result<(), BenchError> {
        let failed = || BenchError::io(format!("talk to port {} of the sandbox", self.port));
        let mut tunnel = sandbox.connect(self.port).await?;
        tunnel.write_all(self.text.as_bytes()).await.map_err(failed())?;
        tunnel.shutdown().await.map_err(failed())?;
        let mut answer = Vec::new();
        tunnel.read_to_end(&mut answer).await.map_err(failed())?;
        match answer.is_empty() {
            false => Ok(()),
            true => Err(BenchError::NoAnswer { port: self.port }),
        }
    }
}

impl FromStr for Ask {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let (port, text) = words.split_once('=').ok_or("not of the form PORT=TEXT")?;
        let port =
            port.parse().map_err(|_| format!("`{port}` is not a port number from 1 to 65535"))?;
        Ok(Ask { port, text: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ask_takes_a_port_and_any_text() {
        let ask = |words: &str| words.parse::<Ask>();
        assert_eq!(ask("80=a=b"), Ok(Ask { port: 80, text: "a=b".into() }));
        for wrong in ["80", "=x", "65536=x", "-1=x", "x=80"] {
            assert!(ask(wrong).is_err(), "{wrong}");
        }
    }
}
