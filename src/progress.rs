//! How far a run is: its stages, what is done of the one at hand, how much longer all of it takes, and the best result so
//! far. A bar on a terminal, a line for every stage elsewhere; nothing for runs of less than two seconds.

use crate::terminal::say;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lathe_runtime::{Listener, Progress, RunEvent};
use std::{
    io::IsTerminal as _,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

/// Work that ends sooner shows nothing.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a bar that is shown moves although nothing was heard.
const TICK: Duration = Duration::from_millis(200);

const STYLE: &str = "{msg} [{bar:30}] {human_pos}/{human_len} {prefix}, {elapsed}";

/// Before the first report, and where nobody knows how much there is to do.
const OPEN_STYLE: &str = "{msg} {spinner} {elapsed}";

/// The share of a run that has to be over before it tells how much longer it takes.
const ENOUGH: f64 = 0.1;

/// One bar, on standard error; a line for every stage where that is not a terminal. It goes away when it is dropped.
pub(crate) struct Meter {
    bar: ProgressBar,
    /// Whether lines are said.
    says: bool,
    what: String,
    start: Instant,
    /// Hung up on drop, which ends the thread that waits to show the bar.
    _waiting: Option<Sender<()>>,
}

impl Meter {
    /// A bar that says `what` goes on: `collecting statistics`. `quiet` shows nothing.
    pub(crate) fn new(what: &str, quiet: bool) -> Meter {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_style(style(OPEN_STYLE));
        bar.set_message(what.to_owned());
        let terminal = std::io::stderr().is_terminal();
        let waiting = (!quiet && terminal).then(|| {
            let (sender, dropped) = mpsc::channel::<()>();
            let bar = bar.clone();
            thread::spawn(move || {
                if let Err(RecvTimeoutError::Timeout) = dropped.recv_timeout(PATIENCE) {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(TICK);
                }
            });
            sender
        });
        Meter { bar, says: !quiet && !terminal, what: what.to_owned(), start: Instant::now(), _waiting: waiting }
    }

    /// Moves the bar at every report. May outlive the bar.
    pub(crate) fn listener(&self) -> Listener {
        let bar = self.bar.clone();
        let last = Arc::new(Mutex::new(Progress::new(0, 0, "")));
        let hear = move |now: &Progress| {
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            // Other work, or the same once more.
            if now.unit != last.unit || now.total != last.total || now.done < last.done {
                bar.set_style(style(if now.total > 0 { STYLE } else { OPEN_STYLE }));
                bar.set_length(now.total);
                bar.set_prefix(now.unit.clone());
            }
            bar.set_position(now.done);
            *last = now.clone();
        };
        let (bar, says, start) = (self.bar.clone(), self.says, self.start);
        let whole = Mutex::new(WholeRun { what: self.what.clone(), ..WholeRun::default() });
        let follow = move |event: &RunEvent| {
            let mut whole = whole.lock().unwrap_or_else(PoisonError::into_inner);
            whole.learn(event);
            bar.set_message(whole.message(start.elapsed()));
            let line = matches!(event, RunEvent::Stage(_) | RunEvent::Best(_));
            if says && line && start.elapsed() >= PATIENCE {
                say(&whole.message(start.elapsed()));
            }
        };
        Listener::new(hear).followed_by(follow)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// What is known of a run as a whole.
#[derive(Default)]
struct WholeRun {
    what: String,
    plan: Vec<(&'static str, f64)>,
    /// The place of the stage at hand in the plan, and its name.
    stage: Option<(usize, &'static str)>,
    /// What is done of the stage, and what of it is at hand.
    part: Option<(f64, String)>,
    best: Option<String>,
}

impl WholeRun {
    fn learn(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Plan(plan) => (self.plan, self.stage, self.part) = (plan.clone(), None, None),
            RunEvent::Stage(name) => {
                // A stage that nobody planned belongs to the one before it.
                let at = self.plan.iter().position(|(planned, _)| planned == name);
                self.stage = Some((at.or(self.stage.map(|(at, _)| at)).unwrap_or(0), *name));
                self.part = None;
            }
            RunEvent::Part(done, of, name) => self.part = Some((*done as f64 / (*of).max(1) as f64, name.clone())),
            RunEvent::Best(best) => self.best = Some(best.clone()),
        }
    }

    /// The share of the run that is over, as far as stages take their usual shares of the time.
    fn done(&self) -> f64 {
        let Some((at, _)) = self.stage else { return 0.0 };
        let all: f64 = self.plan.iter().map(|(_, share)| share).sum();
        let before: f64 = self.plan.iter().take(at).map(|(_, share)| share).sum();
        let now = self.plan.get(at).map_or(0.0, |(_, share)| share * self.part.as_ref().map_or(0.0, |(done, _)| *done));
        if all > 0.0 { (before + now) / all } else { 0.0 }
    }

    /// `optimizing 3/6 propose: quantize, about 40 s left, best so far 0.31 of the size`.
    fn message(&self, elapsed: Duration) -> String {
        let mut text = self.what.clone();
        if let Some((at, name)) = self.stage {
            text += &format!(" {}/{} {name}", at + 1, self.plan.len().max(at + 1));
        }
        if let Some((_, part)) = &self.part {
            text += &format!(": {part}");
        }
        let done = self.done();
        if done >= ENOUGH {
            let left = (elapsed.as_secs_f64() * (1.0 - done) / done).ceil();
            let left = if left < 120.0 { format!("{left} s") } else { format!("{} min", (left / 60.0).round()) };
            text += &format!(", about {left} left");
        }
        if let Some(best) = &self.best {
            text += &format!(", best so far {best}");
        }
        text
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates are well formed").progress_chars("━╸ ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_follows_the_reports() {
        let meter = Meter::new("testing", true);
        let listener = meter.listener();
        for done in [1, 4] {
            listener.hear(&Progress::new(done, 10, "samples"));
        }
        assert_eq!((meter.bar.position(), meter.bar.length(), meter.bar.prefix()), (4, Some(10), "samples".to_owned()));
        listener.hear(&Progress::new(2, 7, "passes"));
        assert_eq!((meter.bar.position(), meter.bar.length(), meter.bar.prefix()), (2, Some(7), "passes".to_owned()));
        assert!(meter.bar.is_hidden());
    }

    #[test]
    fn a_run_tells_its_stages_what_is_left_and_the_best_so_far() {
        let mut run = WholeRun { what: "optimizing".to_owned(), ..WholeRun::default() };
        let after = |run: &mut WholeRun, event: RunEvent| {
            run.learn(&event);
            run.message(Duration::from_secs(30))
        };
        let plan = vec![("simplify and prove", 1.0), ("propose", 2.0), ("fit the budget", 1.0)];
        assert_eq!(after(&mut run, RunEvent::Plan(plan)), "optimizing");
        assert_eq!(after(&mut run, RunEvent::Stage("simplify and prove")), "optimizing 1/3 simplify and prove");
        assert_eq!(after(&mut run, RunEvent::Stage("propose")), "optimizing 2/3 propose, about 90 s left");
        let part = RunEvent::Part(1, 4, "quantize".to_owned());
        assert_eq!(after(&mut run, part), "optimizing 2/3 propose: quantize, about 50 s left");
        let best = RunEvent::Best("0.31 of the size".to_owned());
        after(&mut run, RunEvent::Stage("fit the budget"));
        let said = after(&mut run, best);
        assert_eq!(said, "optimizing 3/3 fit the budget, about 10 s left, best so far 0.31 of the size");
    }
}
