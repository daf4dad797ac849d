//! Where the tasks of connections run: on a thread of their own, or where the endpoint was made.
//!
//! Invariant: all that touches a connection packet by packet runs on one thread, but for what the
//! endpoint's one reader hands to it. Spread over the workers of a runtime, QUIC spends a fifth to a
//! quarter of its time on waking threads, and a link of 1 Gbit/s is not filled on two cores; so it is
//! (docs/transport.md). A [lane](crate::lanes) has a thread of its own.

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

use crate::driver::Driver;
use crate::load::Load;
use crate::timer::Timer;

/// Name of the thread, as `top -H` shows it.
const THREAD_NAME: &str = "longhaul-link";
/// Time given to peers to learn that all sessions of an endpoint were dropped.
const LEAVE_TIME: Duration = Duration::from_secs(2);

/// Where tasks are spawned. Whoever holds it keeps them running.
#[derive(Debug)]
pub(crate) struct Home {
    handle: Handle,
    load: Arc<Load>,
    /// The thread ends once this is dropped.
    _stay: Option<oneshot::Sender<()>>,
}

/// A thread that waits for the endpoint it is to serve.
pub(crate) struct Tenant(oneshot::Sender<quinn::Endpoint>);

impl Home {
    /// The runtime that the caller is in.
    pub(crate) fn here() -> Arc<Self> {
        Arc::new(Self { handle: Handle::current(), load: Arc::default(), _stay: None })
    }

    /// A thread of its own; it ends some time after the last holder has let go.
    pub(crate) fn on_thread() -> io::Result<(Arc<Self>, Tenant)> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let load = Arc::new(Load::default());
        let watched = load.clone();
        // It logs where its maker does.
        let log = tracing::dispatcher::get_default(Clone::clone);
        let (stay, stayed) = oneshot::channel::<()>();
        let (tenant, endpoint) = oneshot::channel::<quinn::Endpoint>();
        thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(move || {
            let serve = async {
                tokio::spawn(watched.watch());
                // Nothing is ever sent: the sender's end is the sign.
                let _ = stayed.await;
                if let Ok(endpoint) = endpoint.await {
                    let _ = tokio::time::timeout(LEAVE_TIME, endpoint.wait_idle()).await;
                }
            };
            tracing::dispatcher::with_default(&log, || runtime.block_on(serve));
        })?;
        Ok((Arc::new(Self { handle, load, _stay: Some(stay) }), Tenant(tenant)))
    }

    /// One more thread, for one connection; where there is no thread of its own here, no other either.
    pub(crate) fn one_more(&self) -> io::Result<Arc<Self>> {
        match self._stay {
            Some(_) => Self::on_thread().map(|(home, _)| home),
            None => Ok(Arc::new(Self {
                handle: self.handle.clone(),
                load: Arc::default(),
                _stay: None,
            })),
        }
    }

    /// Whether its thread has no time to spare, and a core to itself.
    pub(crate) fn is_full(&self) -> bool {
        self.load.is_full()
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
        Box::pin(Timer::new(tokio::time::Instant::from_std(at)))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(Driver::of(future));
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

    /// A driver moves, and its new home stays for as long as it runs.
    #[tokio::test]
    async fn a_driver_moves() {
        let (home, _tenant) = Home::on_thread().unwrap();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (wake, mut woken) = tokio::sync::mpsc::unbounded_channel::<()>();
        let future = Box::pin(async move {
            loop {
                tell.send(thread::current().id()).unwrap();
                if woken.recv().await.is_none() {
                    return;
                }
            }
        });
        let driver = Driver::of(future);
        let seat = crate::driver::Seat::of_new().unwrap();
        home.spawn(driver);
        let first = told.recv().await.unwrap();
        let other = home.one_more().unwrap();
        seat.move_to(&other);
        drop(other);
        // The turn that it is in may take one more from where it was.
        let second = loop {
            wake.send(()).unwrap();
            let at = told.recv().await.unwrap();
            if at != first {
                break at;
            }
        };
        wake.send(()).unwrap();
        assert_eq!(told.recv().await, Some(second));
        drop(wake);
        assert_eq!(told.recv().await, None);
    }

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
