//! The channel as the broker's source of connection requests.

use chitin_broker::egress::{DialRequest, DialSource, Ended};
use tokio::sync::mpsc;

use crate::channel::{Channel, GuestDial, Tunnel};

/// The connection requests of one sandbox, from the creation of this value on.
#[derive(Debug)]
pub(crate) struct DialRequests {
    channel: Channel,
    receiver: mpsc::Receiver<GuestDial>,
}

impl DialRequests {
    pub fn new(channel: &Channel) -> DialRequests {
        DialRequests { channel: channel.clone(), receiver: channel.dial_requests() }
    }
}

impl DialSource for DialRequests {
    type Tunnel = Tunnel;

    async fn next_request(&mut self) -> Option<DialRequest<Tunnel>> {
        Some(match self.receiver.recv().await? {
            GuestDial::Connection { host, port, stream } => {
                DialRequest::Dial { host, port, tunnel: self.channel.adopt_stream(stream) }
            }
            GuestDial::Denied { host } => DialRequest::Denied { host },
        })
    }

    fn take_missed(&mut self) -> u64 {
        self.channel.take_dropped_dials()
    }

    fn ended(&self) -> Ended {
        let channel = self.channel.clone();
        Box::pin(async move {
            channel.wait_until_closed().await;
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use chitin_protocol::{Connection, Direction, Event, Guest, ToHost};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Writes the queued output of an agent.
    fn flush(socket: &mut UnixStream, connection: &mut Connection<Guest>) {
        while !connection.pending_output().is_empty() {
            let count = socket.write(connection.pending_output()).unwrap();
            connection.consume_output(count);
        }
    }

    /// Reads until something happens on a stream: its bytes, or `None` for its reset.
    fn next_data(socket: &mut UnixStream, connection: &mut Connection<Guest>) -> Option<Vec<u8>> {
        loop {
            match connection.next_event().unwrap() {
                Some(Event::Data { bytes, .. }) => return Some(bytes.to_vec()),
                Some(Event::Reset { .. }) => return None,
                Some(_) => {}
                None => {
                    let count = socket.read(connection.input_buffer()).unwrap();
                    connection.commit_input(count);
                }
            }
        }
    }

    #[tokio::test]
    async fn dial_request_carries_its_tunnel() {
        let (ours, mut socket) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours);
        let mut requests = DialRequests::new(&channel);
        let mut agent = Connection::<Guest>::new();
        agent.send_message(&ToHost::Denied { host: "b.test".into() }).unwrap();
        let stream = agent.open_stream(Direction::Both).unwrap();
        agent.send_message(&ToHost::Dial { host: "a.test".into(), port: 443, stream }).unwrap();
        agent.send_data(stream, b"ping");
        flush(&mut socket, &mut agent);

        let denied = requests.next_request().await;
        assert!(matches!(denied, Some(DialRequest::Denied { host }) if host == "b.test"));
        let Some(DialRequest::Dial { host, port: 443, mut tunnel }) = requests.next_request().await
        else {
            panic!("no request")
        };
        assert_eq!(host, "a.test");
        let mut bytes = [0; 4];
        tunnel.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"ping");
        tunnel.write_all(b"pong").await.unwrap();
        let answers = tokio::task::spawn_blocking(move || {
            let answers = [(); 2].map(|()| next_data(&mut socket, &mut agent));
            (answers, socket)
        });
        drop(tunnel);
        let (answers, socket) = answers.await.unwrap();
        assert_eq!(answers, [Some(b"pong".to_vec()), None]);

        assert_eq!(requests.take_missed(), 0);
        drop(socket);
        requests.ended().await;
        assert!(requests.next_request().await.is_none());
    }
}
