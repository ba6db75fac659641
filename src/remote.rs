//! Tasks that are carried out by another process: a cluster behind it, or whatever a Python program hands them to.
//!
//! For every batch of tasks a connection is opened to this machine's own address: a token, then how many there are, and
//! each with its length. The outcomes come back in the same way.

use crate::{RunOptions, runner};
use anyhow::{Context as _, anyhow};
use lathe_runtime::{Executor, ExecutorError, Task};
use std::{
    io::{self, BufRead as _, BufReader, BufWriter, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

/// Where tasks go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum On {
    /// To a Ray cluster: the one at this address, or else one that is started here.
    Ray {
        /// As Ray calls it: `auto`, `ray://HOST:PORT`.
        address: Option<String>,
    },
    /// To a process of this machine that waits for them.
    Server(Server),
}

/// A process of this machine that carries out tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    address: SocketAddr,
    token: String,
    workers: usize,
}

impl FromStr for On {
    type Err = String;

    fn from_str(text: &str) -> Result<On, String> {
        if text == "ray" {
            return Ok(On::Ray { address: None });
        }
        if let Some(address) = text.strip_prefix("ray:") {
            return Ok(On::Ray { address: Some(address.to_owned()) });
        }
        let parts: Vec<&str> = text.split('/').collect();
        let server = match parts[..] {
            [address, token, workers] => address
                .parse()
                .ok()
                .zip(workers.parse().ok())
                .map(|(address, workers)| Server { address, token: token.to_owned(), workers }),
            _ => None,
        };
        server.map(On::Server).ok_or_else(|| format!("tasks cannot go to `{text}`, expected ray or ray:ADDRESS"))
    }
}

/// What carries out tasks elsewhere, with the process that stands between where this program started it.
#[derive(Debug)]
pub(crate) struct Remote {
    server: Server,
    /// Ends when its standard input closes, at the latest with this program.
    _process: Option<Started>,
}

#[derive(Debug)]
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// What was started for one run serves the next with the same options: a cluster takes seconds to start.
static STARTED: Mutex<Option<(Vec<String>, Arc<Remote>)>> = Mutex::new(None);

impl Remote {
    /// What carries out the tasks of runs with these options, whose workers must have this `engine`.
    pub(crate) fn start(on: &On, options: &RunOptions, engine: &str) -> anyhow::Result<Arc<Remote>> {
        let store = options.store.as_deref().context("nothing says which folder every worker sees")?;
        let address = match on {
            On::Server(server) => return Ok(Arc::new(Remote { server: server.clone(), _process: None })),
            On::Ray { address } => address,
        };
        let arguments = ray_arguments(address.as_deref(), options, engine, store);
        let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, remote)) = started.as_ref().filter(|(known, _)| *known == arguments) {
            return Ok(Arc::clone(remote));
        }
        let remote = Arc::new(Remote::start_process(&arguments)?);
        *started = Some((arguments, Arc::clone(&remote)));
        Ok(remote)
    }

    fn start_process(arguments: &[String]) -> anyhow::Result<Remote> {
        let python = runner::python();
        let mut command = Command::new(&python);
        command.args(["-m", "onnx_lathe.distributed"]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let cannot = || format!("`{}`, which talks to Ray, cannot be started", python.display());
        let mut process = Started(command.spawn().with_context(cannot)?);
        let mut line = String::new();
        let output = process.0.stdout.take().expect("it was asked for");
        BufReader::new(output).read_line(&mut line).with_context(cannot)?;
        let server = match line.split_whitespace().collect::<Vec<_>>()[..] {
            [port, token, workers] => port.parse().ok().zip(workers.parse().ok()).map(|(port, workers)| Server {
                address: (Ipv4Addr::LOCALHOST, port).into(),
                token: token.to_owned(),
                workers,
            }),
            _ => None,
        };
        let mut errors = process.0.stderr.take().expect("it was asked for");
        match server {
            Some(server) => {
                // What it says from now on is nobody's to read, and must not fill the pipe.
                let _ = std::thread::Builder::new().spawn(move || io::copy(&mut errors, &mut io::sink()));
                Ok(Remote { server, _process: Some(process) })
            }
            None => {
                let mut said = String::new();
                let _ = errors.take(1 << 20).read_to_string(&mut said);
                let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it does not say why");
                let last = last.trim_start_matches("error: ");
                let hint = if last.contains("No module named") {
                    "; pip install onnx_lathe[ray] has what it takes"
                } else {
                    ""
                };
                Err(anyhow!("no tasks can be carried out on Ray: {last}{hint}"))
            }
        }
    }

    fn talk(&self, tasks: &[Task]) -> io::Result<Result<Vec<Vec<u8>>, String>> {
        let stream = TcpStream::connect(self.server.address)?;
        let mut out = BufWriter::new(&stream);
        out.write_all(format!("{}\n", self.server.token).as_bytes())?;
        out.write_all(&(tasks.len() as u32).to_le_bytes())?;
        for task in tasks {
            out.write_all(&(task.len() as u64).to_le_bytes())?;
            out.write_all(task)?;
        }
        out.flush()?;
        let mut input = BufReader::new(&stream);
        let mut status = [0u8; 1];
        input.read_exact(&mut status)?;
        if status != [0] {
            return Ok(Err(String::from_utf8_lossy(&part(&mut input)?).into_owned()));
        }
        let mut count = [0u8; 4];
        input.read_exact(&mut count)?;
        (0..u32::from_le_bytes(count)).map(|_| part(&mut input)).collect::<io::Result<_>>().map(Ok)
    }
}

/// The arguments of the module that talks to Ray.
fn ray_arguments(address: Option<&str>, options: &RunOptions, engine: &str, store: &Path) -> Vec<String> {
    let mut arguments = vec!["serve-ray".to_owned()];
    let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    if let Some(address) = address {
        add("--address", address.to_owned());
    }
    add("--jobs", options.jobs.to_string());
    add("--cpus", options.load.threads.max(1).to_string());
    add("--gpus", usize::from(options.load.provider != "cpu").to_string());
    if let Some(program) = runner::own_program() {
        add("--worker", program.display().to_string());
    }
    if let Some(library) = &options.ort {
        add("--ort", library.display().to_string());
    }
    add("--timeout", options.timeout.as_secs().to_string());
    add("--version", runner::VERSION.to_owned());
    add("--engine", engine.to_owned());
    add("--store", store.display().to_string());
    arguments
}

/// Bytes after their length. Memory grows with what arrives, not with what was promised.
fn part(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0u8; 8];
    input.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let mut bytes = Vec::new();
    let arrived = input.take(length).read_to_end(&mut bytes)? as u64;
    if arrived == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

impl Executor for Remote {
    fn map(&self, tasks: Vec<Task>) -> Result<Vec<Vec<u8>>, ExecutorError> {
        let lost = |e: io::Error| ExecutorError { message: format!("what carries out tasks does not answer: {e}") };
        self.talk(&tasks).map_err(lost)?.map_err(|message| ExecutorError { message })
    }

    fn workers(&self) -> usize {
        self.server.workers.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, thread};

    /// The token, and the tasks.
    type Heard = (String, Vec<Vec<u8>>);

    /// Answers one connection: the token, the tasks, and then `reply`.
    fn answer(reply: Vec<u8>) -> (Remote, thread::JoinHandle<Heard>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let heard = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut input = BufReader::new(&stream);
            let mut token = String::new();
            input.read_line(&mut token).unwrap();
            let mut count = [0u8; 4];
            input.read_exact(&mut count).unwrap();
            let tasks = (0..u32::from_le_bytes(count)).map(|_| part(&mut input).unwrap()).collect();
            (&stream).write_all(&reply).unwrap();
            (token, tasks)
        });
        let server = Server { address, token: "secret".to_owned(), workers: 2 };
        (Remote { server, _process: None }, heard)
    }

    fn sized(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
    }

    #[test]
    fn tasks_go_and_outcomes_come_in_order() {
        let reply = [&[0u8][..], &2u32.to_le_bytes(), &sized(b"one"), &sized(b"")].concat();
        let (remote, heard) = answer(reply);
        assert_eq!(remote.map(vec![b"a".to_vec(), b"bc".to_vec()]).unwrap(), [b"one".to_vec(), Vec::new()]);
        assert_eq!(heard.join().unwrap(), ("secret\n".to_owned(), vec![b"a".to_vec(), b"bc".to_vec()]));
    }

    #[test]
    fn an_error_is_a_sentence_and_so_is_silence() {
        let (remote, _heard) = answer([&[1u8][..], &sized("a worker was lost".as_bytes())].concat());
        assert_eq!(remote.map(vec![b"a".to_vec()]).unwrap_err().message, "a worker was lost");
        let (remote, _heard) = answer([&[0u8][..], &1u32.to_le_bytes(), &u64::MAX.to_le_bytes()].concat());
        let error = remote.map(vec![b"a".to_vec()]).unwrap_err().message;
        assert!(error.starts_with("what carries out tasks does not answer"), "{error}");
    }

    #[test]
    fn reads_where_tasks_go() {
        assert_eq!("ray".parse(), Ok(On::Ray { address: None }));
        assert_eq!("ray:auto".parse(), Ok(On::Ray { address: Some("auto".to_owned()) }));
        let server = Server { address: ([127, 0, 0, 1], 80).into(), token: "t".to_owned(), workers: 3 };
        assert_eq!("127.0.0.1:80/t/3".parse(), Ok(On::Server(server)));
        for wrong in ["", "slurm", "127.0.0.1:80", "127.0.0.1/t/3"] {
            assert!(wrong.parse::<On>().is_err(), "{wrong}");
        }
    }
}
