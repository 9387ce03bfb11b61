//! The thread on which one migration's host is called: blocking calls, one after the other, each answered by an event.
//! So the driver always reacts, however long the host takes.

use crate::host::HostError;
use crate::lanes::CpuMeter;
use limosa_proto::event::HostTask;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;

type Job<H> = Box<dyn FnOnce(&mut H) + Send>;

/// The thread; it ends when this is dropped and the calls that were made are through.
pub(crate) struct Hosted<H> {
    jobs: mpsc::Sender<Job<H>>,
}

/// What became of a call.
pub(crate) type Called<T> = Result<T, (HostTask, String)>;

impl<H: Send + 'static> Hosted<H> {
    /// A thread named `name` that owns `host` and counts its CPU time in `cpu_ns`.
    pub(crate) fn start(name: &str, mut host: H, cpu_ns: Arc<AtomicU64>) -> std::io::Result<Hosted<H>> {
        let (jobs, waiting) = mpsc::channel::<Job<H>>();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut meter = CpuMeter::new(&cpu_ns);
            while let Ok(job) = waiting.recv() {
                job(&mut host);
                meter.count();
            }
        })?;
        Ok(Hosted { jobs })
    }

    /// Makes a call; `then` gets its answer, on the host's thread.
    pub(crate) fn call<T>(
        &self,
        task: HostTask,
        call: impl FnOnce(&mut H) -> Result<T, HostError> + Send + 'static,
        then: impl FnOnce(Called<T>) + Send + 'static,
    ) {
        let job: Job<H> = Box::new(move |host| {
            let called = catch_unwind(AssertUnwindSafe(|| call(host)));
            then(match called {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(error)) => Err((task, error.words)),
                Err(_) => Err((task, "the host's code panicked".to_owned())),
            });
        });
        // The thread lives as long as this does: it catches what a job does wrong.
        let _ = self.jobs.send(job);
    }
}
