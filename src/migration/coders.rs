//! The threads that compress.
//!
//! Invariant: they take what is left of the host's cores: guests, and the threads that read, hash and
//! send, come before them. There is one for each core, up to [`CODERS_MAX`], for all attempts together.

use std::sync::LazyLock;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

/// Cores of a host that are compressed on, at most.
const CODERS_MAX: usize = 4;
/// Of a core that others want too, a thread with this has a tenth.
const NICE: i32 = 10;

static POOL: LazyLock<ThreadPool> = LazyLock::new(|| {
    ThreadPoolBuilder::new()
        .num_threads(std::thread::available_parallelism().map_or(1, usize::from).min(CODERS_MAX))
        .thread_name(|at| format!("coder-{at}"))
        // Where it is refused, they compress all the same.
        .start_handler(|_| {
            let _ = rustix::process::setpriority_process(None, NICE);
        })
        // Who waits for the work learns of it, and the agent lives on.
        .panic_handler(drop)
        .build()
        .expect("threads can be started while an agent starts")
});

/// How many work at once.
pub(super) fn count() -> usize {
    POOL.current_num_threads()
}

/// Does work on one of them.
pub(super) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (give, take) = oneshot::channel();
    POOL.spawn(move || drop(give.send(work())));
    take.await.expect("coding does not panic")
}
