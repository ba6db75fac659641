//! Asking: one worker, several at a time, or whatever else carries out tasks.

use super::Child;
use crate::{
    Listener, Progress, RuntimeError, Task,
    wire::{WorkerAnswer, WorkerRequest, framing},
};
use bytes::Bytes;
use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Times that a request is asked again where somebody else ended the worker that was at it.
const RETRIES: usize = 2;

impl Child {
    /// Sends requests without a payload, and waits for their answers, which come in their order.
    pub(super) fn ask_all(&self, requests: Vec<WorkerRequest>) -> Vec<Result<Answer, RuntimeError>> {
        if self.executor.is_some() && requests.iter().all(WorkerRequest::travels) {
            let count = requests.len();
            let requests = requests.into_iter().map(|request| (request, Vec::new())).collect();
            let failed = |error: RuntimeError| (0..count).map(|_| Err(error.clone())).collect();
            return self.elsewhere(requests).unwrap_or_else(failed);
        }
        let threads = self.pool.most().min(requests.len());
        if threads < 2 {
            return requests.iter().map(|request| self.ask(request, &[])).collect();
        }
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let listener = self.listener.of_many();
        let unit = format!("tasks on {threads} workers");
        let work = || {
            let mut answers = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(request) = requests.get(at) else { return answers };
                answers.push((at, self.ask_heard_by(&listener, request, &[])));
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                self.listener.hear(&Progress::new(done, requests.len(), &unit));
            }
        };
        let mut all: Vec<(usize, Result<Answer, RuntimeError>)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("a worker only asks")).collect()
        });
        all.sort_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, answer)| answer).collect()
    }

    /// Has requests carried out by the executor: not many more at a time than it has workers, so that work that is called
    /// off ends soon.
    pub(super) fn elsewhere(
        &self,
        requests: Vec<(WorkerRequest, Vec<&[u8]>)>,
    ) -> Result<Vec<Result<Answer, RuntimeError>>, RuntimeError> {
        let Some(executor) = &self.executor else { return Ok(Vec::new()) };
        let lost = |message: String| RuntimeError::Child(message);
        let mut answers = Vec::new();
        for part in requests.chunks(2 * executor.workers().max(1)) {
            if self.listener.is_stopped() {
                return Err(RuntimeError::Stopped);
            }
            let _span = self.listener.span(part.first().map_or("tasks", |(request, _)| request.name()));
            let task = |(request, payload): &(WorkerRequest, Vec<&[u8]>)| {
                let mut task = Vec::new();
                framing::write(&mut task, request, payload).map(|()| task)
            };
            let tasks: Vec<Task> = part.iter().map(task).collect::<io::Result<_>>().map_err(|e| lost(e.to_string()))?;
            let outcomes = executor.map(tasks).map_err(|error| lost(error.message))?;
            if outcomes.len() != part.len() {
                return Err(lost(format!("{} tasks have {} outcomes", part.len(), outcomes.len())));
            }
            answers.extend(outcomes.iter().map(|outcome| last_answer(outcome)));
            if requests.len() > 1 {
                let unit = format!("tasks on {} workers", executor.workers());
                self.listener.hear(&Progress::new(answers.len(), requests.len(), &unit));
            }
        }
        Ok(answers)
    }

    /// Sends one request and waits for its answer. A worker that fails is gone afterwards; the next request starts anew.
    /// Requests change nothing but files that are put in place whole, so one whose worker was killed is asked again.
    pub(super) fn ask(&self, request: &WorkerRequest, payload: &[&[u8]]) -> Result<Answer, RuntimeError> {
        self.ask_heard_by(&self.listener, request, payload)
    }

    fn ask_heard_by(
        &self,
        listener: &Listener,
        request: &WorkerRequest,
        payload: &[&[u8]],
    ) -> Result<Answer, RuntimeError> {
        if self.executor.is_some() && request.travels() {
            let answers = self.elsewhere(vec![(request.clone(), payload.to_vec())])?.pop();
            return answers.unwrap_or_else(|| Err(RuntimeError::Child("a task has no outcome".to_owned())));
        }
        let mut retries = 0;
        loop {
            match self.ask_once(listener, request, payload) {
                Err(RuntimeError::Ended { killed: true, .. }) if retries < RETRIES => retries += 1,
                answer => return answer,
            }
        }
    }

    fn ask_once(
        &self,
        listener: &Listener,
        request: &WorkerRequest,
        payload: &[&[u8]],
    ) -> Result<Answer, RuntimeError> {
        if self.listener.is_stopped() {
            return Err(RuntimeError::Stopped);
        }
        let mut lent = self.pool.lend(request.wants_the_machine(), &self.listener)?;
        let worker = lent.worker();
        let span = self.listener.span_of(worker.process_id(), "request", request.name());
        worker.send(request, payload);
        let answer = worker.wait(self.limits, listener);
        drop(span);
        match answer {
            Err(error) => {
                lent.lose();
                Err(if self.listener.is_stopped() { RuntimeError::Stopped } else { error })
            }
            Ok(answer) => told(answer),
        }
    }
}

/// What a worker answers, with its payload.
pub(super) type Answer = (WorkerAnswer, Bytes);

/// An answer that says that nothing came of a request is an error.
fn told((answer, payload): Answer) -> Result<Answer, RuntimeError> {
    match answer {
        WorkerAnswer::Error(message) => Err(RuntimeError::Child(message)),
        WorkerAnswer::NoEngine(message) => Err(RuntimeError::NoEngine(message)),
        answer => Ok((answer, payload)),
    }
}

/// The answer in what a worker wrote; what it did on the way comes first.
fn last_answer(mut outcome: &[u8]) -> Result<Answer, RuntimeError> {
    let broken = |e: io::Error| RuntimeError::Child(format!("the outcome of a task is damaged: {e}"));
    loop {
        match framing::read::<WorkerAnswer>(&mut outcome).map_err(broken)? {
            None => return Err(RuntimeError::Child("the outcome of a task has no answer".to_owned())),
            Some((WorkerAnswer::Stage(_) | WorkerAnswer::Progress(_), _)) => {}
            Some(answer) => return told(answer),
        }
    }
}
