//! The threads of this backend: `KVARN_NUM_THREADS` of them, by default one per core.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Number of threads used.
pub fn threads() -> usize {
    std::env::var("KVARN_NUM_THREADS")
        .ok()
        .and_then(|value| value.parse().ok())
        .filter(|&count| (1..=1024).contains(&count))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Runs `work` where rayon's parallel calls use this backend's threads.
pub(crate) fn install<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    match pool() {
        // Also where it is one thread: rayon's calls would otherwise use a pool of its own, of all cores.
        Some(pool) => pool.install(work),
        // No threads to be had: the caller's will do.
        None => work(),
    }
}

/// Cuts `0..count` into a part for each thread and returns what `work` makes of them. The caller's thread does the first, so
/// that short work does not wait for two others to wake.
pub(crate) fn share<R: Send>(count: usize, work: impl Fn(Range<usize>) -> R + Sync) -> Vec<R> {
    let pool = pool();
    let parts = pool.as_ref().map_or(1, |pool| pool.current_num_threads()).min(count).max(1);
    let range = |part: usize| count * part / parts..count * (part + 1) / parts;
    let mut results: Vec<Option<R>> = (0..parts).map(|_| None).collect();
    let (first, others) = results.split_first_mut().expect("one part at least");
    match pool {
        Some(pool) if !others.is_empty() => pool.in_place_scope(|scope| {
            for (part, result) in (1..).zip(others) {
                let work = &work;
                scope.spawn(move |_| *result = Some(work(range(part))));
            }
            *first = Some(work(range(0)));
        }),
        _ => *first = Some(work(range(0))),
    }
    results.into_iter().flatten().collect()
}

/// The threads; none if there are none to be had.
///
/// They belong to one process: after a fork, the child, which inherits no threads, starts its own.
fn pool() -> Option<Arc<ThreadPool>> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    match &*pool {
        Some((owner, threads)) if *owner == process => Some(Arc::clone(threads)),
        _ => {
            let built = ThreadPoolBuilder::new()
                .num_threads(threads())
                .thread_name(|index| format!("kvarn-{index}"))
                .build()
                .ok()
                .map(Arc::new);
            // A parent's pool is never dropped here: joining threads that do not exist would hang.
            let old = std::mem::replace(&mut *pool, built.clone().map(|threads| (process, threads)));
            std::mem::forget(old);
            built
        }
    }
}
