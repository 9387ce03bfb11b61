//! Where the two ends run: as processes on this machine, or in the two machines of the lab. It carries orders and answers and ends
//! what it started; what they mean is in `orders`.

use crate::hosts::Spent;
use crate::orders::{Answer, Order};
use anyhow::{Context, Result, bail, ensure};
use rig::roce::{Machine, Machines, Running};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long an end may take for one order.
const ANSWER_MAX: Duration = Duration::from_secs(300);
/// How long it may take to end.
const GRACE: Duration = Duration::from_secs(2);
/// How often a machine of the lab is asked for more output.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running end.
pub(crate) struct End {
    name: &'static str,
    process: Process,
}

enum Process {
    Here { child: Child, input: Option<ChildStdin>, lines: Receiver<String> },
    There { running: Running, read: usize },
}

fn words(is_source: bool) -> [&'static str; 3] {
    ["--bench", "--end", if is_source { "source" } else { "destination" }]
}

impl End {
    /// Starts an end on this machine, in this process's network namespace.
    pub(crate) fn here(is_source: bool) -> Result<End> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut command = Command::new(program);
        command.args(words(is_source)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("an end cannot be started")?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let (say, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if say.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(End { name: words(is_source)[2], process: Process::Here { child, input, lines } })
    }

    /// Starts an end in a machine of the lab.
    pub(crate) fn there(machines: &Machines, is_source: bool) -> Result<End> {
        let program = std::env::current_exe().context("this program's own path")?;
        let program = program.to_str().context("this program's path is no text")?;
        let machine: &Machine = if is_source { machines.alpha() } else { machines.beta() };
        let [first, second, third] = words(is_source);
        let running = machine.task(&[program, first, second, third]).spawn()?;
        Ok(End { name: third, process: Process::There { running, read: 0 } })
    }

    /// Gives an order and waits for the answer.
    ///
    /// # Errors
    /// The end is gone, says nothing, or could not do it.
    pub(crate) fn ask(&mut self, order: &Order) -> Result<Answer> {
        let line = serde_json::to_string(order)? + "\n";
        let said = match &mut self.process {
            Process::Here { input, lines, .. } => {
                let input = input.as_mut().context("an end without input")?;
                input.write_all(line.as_bytes()).and_then(|()| input.flush()).context("an end is gone")?;
                match lines.recv_timeout(ANSWER_MAX) {
                    Ok(line) => line,
                    Err(RecvTimeoutError::Timeout) => bail!("the {} does not answer", self.name),
                    Err(RecvTimeoutError::Disconnected) => bail!("the {} has ended", self.name),
                }
            }
            Process::There { running, read } => {
                running.write(line.as_bytes())?;
                line_of(running, read).with_context(|| format!("the {}", self.name))?
            }
        };
        match serde_json::from_str(&said).with_context(|| format!("the {} said: {said}", self.name))? {
            Answer::Failed(words) => bail!("the {}: {words}", self.name),
            answer => Ok(answer),
        }
    }

    /// Gives an order that is answered by `Done`.
    pub(crate) fn tell(&mut self, order: &Order) -> Result<()> {
        match self.ask(order)? {
            Answer::Done => Ok(()),
            other => bail!("the {} answered {other:?}", self.name),
        }
    }

    /// Waits for the program that was started; what it printed.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub(crate) fn ended(&mut self, seconds: u64) -> Result<(String, Spent)> {
        match self.ask(&Order::Wait { seconds })? {
            Answer::Ended { status: Some(0), stdout, spent, .. } => Ok((stdout, spent)),
            Answer::Ended { status, stdout, stderr, .. } => {
                let how = status.map_or_else(|| format!("did not end within {seconds} s"), |code| format!("ended with {code}"));
                let said = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
                bail!("at the {} it {how}: {said}{}", self.name, tail(&stdout))
            }
            other => bail!("the {} answered {other:?}", self.name),
        }
    }
}

/// The last line that says something.
fn tail(text: &str) -> String {
    text.lines().rfind(|line| !line.trim().is_empty()).map(|line| format!(" {}", line.trim())).unwrap_or_default()
}

fn line_of(running: &Running, read: &mut usize) -> Result<String> {
    let until = Instant::now() + ANSWER_MAX;
    loop {
        let ended = running.ended();
        let (printed, errors) = running.printed();
        let rest = printed.get(*read..).unwrap_or_default();
        if let Some((line, _)) = rest.split_once('\n') {
            *read += line.len() + 1;
            return Ok(line.to_owned());
        }
        ensure!(!ended, "has ended:{}", tail(&errors));
        ensure!(Instant::now() < until, "does not answer");
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        match &mut self.process {
            Process::Here { child, input, .. } => {
                // At the end of its input it ends, and what it started with it.
                drop(input.take());
                let until = Instant::now() + GRACE;
                while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
                    std::thread::sleep(LOOK_AGAIN);
                }
                let _ = child.kill();
                let _ = child.wait();
            }
            Process::There { running, .. } => {
                let _ = running.kill();
            }
        }
    }
}
