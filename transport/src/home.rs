//! Where an endpoint's tasks run: on a thread of their own, or where the endpoint was made.
//!
//! Invariant: all that touches a connection packet by packet runs on one thread. Spread over the
//! workers of a runtime, QUIC spends a fifth to a quarter of its time on waking threads, and a link of
//! 1 Gbit/s is not filled on two cores; so it is (docs/transport.md).

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Name of the thread, as `top -H` shows it.
const THREAD_NAME: &str = "longhaul-link";
/// Time given to peers to learn that all sessions of an endpoint were dropped.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// Where tasks are spawned. Whoever holds it keeps them running.
#[derive(Debug)]
pub(crate) struct Home {
    handle: Handle,
    /// The thread ends once this is dropped.
    _stay: Option<oneshot::Sender<()>>,
}

/// A thread that waits for the endpoint it is to serve.
pub(crate) struct Tenant(oneshot::Sender<quinn::Endpoint>);

impl Home {
    /// The runtime that the caller is in.
    pub(crate) fn here() -> Arc<Self> {
        Arc::new(Self { handle: Handle::current(), _stay: None })
    }

    /// A thread of its own; it ends some time after the last holder has let go.
    pub(crate) fn on_thread() -> io::Result<(Arc<Self>, Tenant)> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        // It logs where its maker does.
        let log = tracing::dispatcher::get_default(Clone::clone);
        let (stay, stayed) = oneshot::channel::<()>();
        let (tenant, endpoint) = oneshot::channel::<quinn::Endpoint>();
        thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(move || {
            let serve = async {
                // Nothing is ever sent: the sender's end is the sign.
                let _ = stayed.await;
                if let Ok(endpoint) = endpoint.await {
                    let _ = tokio::time::timeout(LEAVE_TIME, endpoint.wait_idle()).await;
                }
            };
            tracing::dispatcher::with_default(&log, || runtime.block_on(serve));
        })?;
        Ok((Arc::new(Self { handle, _stay: Some(stay) }), Tenant(tenant)))
    }

    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.handle.spawn(task)
    }

    /// What quinn spawns and waits with.
    pub(crate) fn runtime(&self) -> HomeRuntime {
        HomeRuntime(self.handle.clone())
    }
}

impl Tenant {
    /// The thread waits for what `endpoint` still has to say before it ends.
    pub(crate) fn moves_in(self, endpoint: quinn::Endpoint) {
        // The thread takes it when it ends.
        let _ = self.0.send(endpoint);
    }
}

/// A home as quinn sees it: does not keep it.
#[derive(Debug)]
pub(crate) struct HomeRuntime(Handle);

impl Runtime for HomeRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _inside = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _inside = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_thread_ends_with_its_last_holder() {
        let (home, tenant) = Home::on_thread().unwrap();
        let (never, ended) = oneshot::channel::<()>();
        let task = home.spawn(async move {
            let _held = never;
            std::future::pending::<()>().await;
        });
        drop(tenant);
        drop(home);
        // The runtime is gone, and with it all that ran there.
        assert!(ended.await.is_err());
        assert!(task.await.unwrap_err().is_cancelled());
    }
}
