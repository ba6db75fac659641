//! The worker's side: reads requests, runs models, writes answers, until the stream ends.

use crate::{
    Engine, Inputs, Progress, RuntimeError, Session as _, Source, Talk, VerifyTask, bench,
    datum::only_tensors,
    layers, measure, select,
    sessions::SessionStore,
    statistics, trials,
    verify::{Edges, verify_at},
    wire::{
        InputHeads, WorkerAnswer, WorkerRequest,
        framing::{self, PayloadError},
    },
};
use bytes::Bytes;
use lathe_ir::Model;
use std::{
    error::Error,
    io::{self, BufReader, Read, Write},
    rc::Rc,
};

/// Serves requests on standard input and output. What the hidden subcommand of the program calls.
///
/// An engine that could not be started is reported to every request. Where the system tells, the process ends with the one
/// that started it, whatever it is doing.
///
/// Sessions stay loaded while they take at most `keep` bytes. `version` is that of the program.
pub fn serve(engine: Result<&dyn Engine, RuntimeError>, keep: u64, version: &str) -> io::Result<()> {
    end_with_parent();
    serve_on(
        (engine.map(|engine| SessionStore::new(engine, keep)), version),
        &mut BufReader::new(io::stdin().lock()),
        &mut io::stdout().lock(),
    )
}

/// Ends this process soon after its parent: work that nobody waits for would go on for minutes.
fn end_with_parent() {
    #[cfg(unix)]
    {
        let parent = std::os::unix::process::parent_id();
        let watch = move || {
            while std::os::unix::process::parent_id() == parent {
                std::thread::sleep(std::time::Duration::from_millis(500));
            }
            std::process::exit(1);
        };
        // Without it the process ends when its work is done.
        let _ = std::thread::Builder::new().spawn(watch);
    }
}

fn serve_on(
    (sessions, version): (Result<SessionStore<'_>, RuntimeError>, &str),
    input: &mut dyn Read,
    output: &mut dyn Write,
) -> io::Result<()> {
    while let Some((request, payload)) = framing::read::<WorkerRequest>(input)? {
        let answered = match &sessions {
            Ok(sessions) if matches!(request, WorkerRequest::Hello) => {
                let (name, providers) = (sessions.engine().name(), sessions.engine().providers());
                Ok((WorkerAnswer::Hello { name, providers, version: version.to_owned() }, Vec::new()))
            }
            Ok(sessions) => answer(sessions, request, payload, output),
            Err(error) => {
                framing::write(output, &WorkerAnswer::NoEngine(error.to_string()), &[])?;
                continue;
            }
        };
        match answered {
            Ok((answer, parts)) => {
                let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
                framing::write(output, &answer, &parts)?;
            }
            Err(error) => framing::write(output, &WorkerAnswer::Error(error.to_string()), &[])?,
        }
    }
    Ok(())
}

/// Answers one request. Of whatever goes wrong the program hears the sentence.
fn answer(
    sessions: &SessionStore<'_>,
    request: WorkerRequest,
    mut payload: Bytes,
    output: &mut dyn Write,
) -> Result<(WorkerAnswer, Vec<Bytes>), Box<dyn Error>> {
    let mut talk = Pipe(output);
    let engine = sessions.engine();
    match request {
        WorkerRequest::Hello => unreachable!("it is answered where the version is known"),
        WorkerRequest::Evaluate { model, inputs, options } => {
            let length = usize::try_from(model).ok().filter(|&l| l <= payload.len());
            let model = payload.split_to(length.ok_or(PayloadError::Short)?);
            let inputs = framing::unpack(inputs, &mut payload)?;
            talk.stage("loading the model");
            let mut session = engine.load(Source::Bytes(&model), &options)?;
            talk.stage("running the model");
            let outputs = only_tensors(session.run(&inputs)?)?;
            let (heads, parts) = framing::pack(&outputs);
            Ok((WorkerAnswer::Outputs(heads), parts))
        }
        WorkerRequest::Run { model, inputs, options } => {
            let inputs = framing::unpack_all(inputs, &mut payload)?;
            talk.stage("loading the model");
            let mut session = sessions.load(&model, &options)?;
            let mut outputs = Vec::new();
            for sample in &inputs {
                // Runs of many plans begin alike.
                let ran = match session.known(sample) {
                    Some(known) => known.to_vec(),
                    None => {
                        talk.stage("running the model");
                        let ran = Rc::new(session.run(sample)?);
                        session.remember(sample, &ran);
                        ran.to_vec()
                    }
                };
                outputs.push(only_tensors(ran)?);
            }
            let (heads, parts) = framing::pack_all(&outputs);
            Ok((WorkerAnswer::Ran(heads), parts))
        }
        WorkerRequest::Verify { reference, candidate, inputs, claim, reference_options, options, left_out } => {
            let inputs = match inputs {
                InputHeads::Random(spec) => Inputs::Random(spec),
                InputHeads::Set(spec) => Inputs::Set(spec),
                InputHeads::Given(samples) => Inputs::Given(framing::unpack_all(samples, &mut payload)?),
            };
            talk.stage("reading the original");
            let model = Model::read(&reference)?.model;
            let task = VerifyTask {
                model: &model,
                reference: Source::Path(&reference),
                candidate: Source::Path(&candidate),
                inputs: &inputs,
                claim,
                reference_options: &reference_options,
                options: &options,
            };
            let verdict = verify_at(Edges::AllBut(&left_out), engine, &task, &mut talk)?;
            Ok((WorkerAnswer::Verdict(verdict), Vec::new()))
        }
        WorkerRequest::Layers(job) => {
            let report = layers::compare_layers(engine, &job, &mut talk)?;
            Ok((WorkerAnswer::Layers(Box::new(report)), Vec::new()))
        }
        WorkerRequest::Select(job) => Ok((WorkerAnswer::Selected(select::serve(engine, &job, &mut talk)?), Vec::new())),
        WorkerRequest::Gather(job) => {
            Ok((WorkerAnswer::Gathered(statistics::serve(engine, &job, &mut talk)?), Vec::new()))
        }
        WorkerRequest::Trials(job) => Ok((WorkerAnswer::Tried(trials::serve(sessions, &job, &mut talk)?), Vec::new())),
        WorkerRequest::Measure(job) => {
            let measured = measure::serve(sessions, &job, &mut talk)?;
            Ok((WorkerAnswer::Measured(measured.map(Box::new)), Vec::new()))
        }
        WorkerRequest::Bench { models, inputs, task, options } => {
            Ok((WorkerAnswer::Timed(bench(engine, &models, &inputs, &task, &options, &mut talk)?), Vec::new()))
        }
    }
}

/// Talks to the program. What cannot be said is a pipe that has closed; the answer will fail in the same way.
struct Pipe<'a>(&'a mut dyn Write);

impl Talk for Pipe<'_> {
    fn stage(&mut self, what: &str) {
        let _ = framing::write(self.0, &WorkerAnswer::Stage(what.to_owned()), &[]);
    }

    fn progress(&mut self, done: usize, total: usize, unit: &str) {
        let _ = framing::write(self.0, &WorkerAnswer::Progress(Progress::new(done, total, unit)), &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        LoadOptions,
        testing::{engine, unary},
    };
    use lathe_ir::{Node, Tensor};

    #[test]
    fn answers_until_the_stream_ends() {
        let model = unary(Node::new("Relu")).to_bytes();
        let (inputs, parts) = framing::pack(&[("x".to_owned(), Tensor::from_f32s(&[1, 3], &[-1.0, 0.5, 2.0]))]);
        let mut wire = Vec::new();
        let options = LoadOptions::default();
        let request = WorkerRequest::Evaluate { model: model.len() as u64, inputs, options };
        framing::write(&mut wire, &WorkerRequest::Hello, &[]).unwrap();
        framing::write(&mut wire, &request, &[&model, &parts[0]]).unwrap();
        let mut answers = Vec::new();
        serve_on((Ok(SessionStore::new(engine(), 0)), "1"), &mut &wire[..], &mut answers).unwrap();
        let mut answers = &answers[..];
        let mut seen = Vec::new();
        while let Some((answer, mut payload)) = framing::read::<WorkerAnswer>(&mut answers).unwrap() {
            seen.push(match answer {
                WorkerAnswer::Hello { name, .. } => name[..12].to_owned(),
                WorkerAnswer::Stage(what) => what,
                WorkerAnswer::Outputs(heads) => {
                    format!("{:?}", framing::unpack(heads, &mut payload).unwrap()[0].1.to_f32s().unwrap())
                }
                other => format!("{other:?}"),
            });
        }
        assert_eq!(seen, ["ONNX Runtime", "loading the model", "running the model", "[0.0, 0.5, 2.0]"]);
    }

    #[test]
    fn progress_is_an_answer_before_the_answer() {
        let mut wire = Vec::new();
        Pipe(&mut wire).progress(3, 8, "samples");
        let (answer, _) = framing::read::<WorkerAnswer>(&mut &wire[..]).unwrap().unwrap();
        assert!(matches!(answer, WorkerAnswer::Progress(progress) if progress == Progress::new(3, 8, "samples")));
    }

    #[test]
    fn a_missing_engine_is_an_answer() {
        let mut wire = Vec::new();
        framing::write(&mut wire, &WorkerRequest::Hello, &[]).unwrap();
        let mut answers = Vec::new();
        let missing = RuntimeError::NoLibrary { tried: vec!["nowhere".into()] };
        serve_on((Err(missing), "1"), &mut &wire[..], &mut answers).unwrap();
        let (answer, _) = framing::read::<WorkerAnswer>(&mut &answers[..]).unwrap().unwrap();
        assert!(matches!(answer, WorkerAnswer::NoEngine(message) if message.contains("tried nowhere")));
    }
}
