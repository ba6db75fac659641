//! The bar on the terminal for work over two seconds: how far, how fast, how much longer.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lathe_runtime::{Listener, Progress};
use std::{
    io::IsTerminal as _,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

/// Work that ends sooner shows nothing.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a bar that is shown moves although nothing was heard.
const TICK: Duration = Duration::from_millis(200);

const STYLE: &str = "{msg} [{bar:30}] {human_pos}/{human_len} {prefix}, {per_sec}, {eta} left";

/// Before the first report, and where nobody knows how much there is to do.
const OPEN_STYLE: &str = "{msg} {spinner} {elapsed}";

/// One bar, on standard error; nothing where that is not a terminal. It goes away when it is dropped.
pub(crate) struct Meter {
    bar: ProgressBar,
    /// Hung up on drop, which ends the thread that waits to show the bar.
    _waiting: Option<Sender<()>>,
}

impl Meter {
    /// A bar that says `what` goes on: `collecting statistics`. `quiet` shows nothing.
    pub(crate) fn new(what: &str, quiet: bool) -> Meter {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_style(style(OPEN_STYLE));
        bar.set_message(what.to_owned());
        let shown = !quiet && std::io::stderr().is_terminal();
        let waiting = shown.then(|| {
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
        Meter { bar, _waiting: waiting }
    }

    /// Moves the bar at every report. May outlive the bar.
    pub(crate) fn listener(&self) -> Listener {
        let bar = self.bar.clone();
        let last = Arc::new(std::sync::Mutex::new(Progress::new(0, 0, "")));
        Listener::new(move |now| {
            let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // Other work, or the same once more: the rate of the last says nothing about it.
            if now.unit != last.unit || now.total != last.total || now.done < last.done {
                bar.set_style(style(if now.total > 0 { STYLE } else { OPEN_STYLE }));
                bar.set_length(now.total);
                bar.set_prefix(now.unit.clone());
                bar.set_position(0);
                bar.reset_eta();
            }
            bar.set_position(now.done);
            *last = now.clone();
        })
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
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
}
