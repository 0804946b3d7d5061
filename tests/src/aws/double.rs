//! A loopback server that speaks AWS's JSON protocol and answers as the test says: for what moto lacks, and for what no
//! real API does on command. What it was asked and what it answered can be judged by AWS's own description of the API,
//! which botocore carries.
//!
//! Must not know what is asked for.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Api;

/// What comes back.
#[derive(Clone, Debug)]
pub enum Said {
    Ok(Value),
    /// An error of the API: status, code, message.
    Error(u16, &'static str, &'static str),
    /// Something that is no answer of the API.
    Raw(u16, &'static str),
    /// The connection stays open, and nothing comes.
    Nothing,
}

/// A question that was asked.
#[derive(Clone, Debug)]
pub struct Question {
    pub action: String,
    pub body: Value,
    pub at: Instant,
    pub said: Said,
}

type Script = Box<dyn FnMut(&str, &Value) -> Said + Send>;

/// See the module's text.
pub struct Double {
    api: Api,
    addr: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    script: Script,
    asked: Vec<Question>,
}

impl fmt::Debug for Double {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a double of {} at {}", self.api.name(), self.addr)
    }
}

impl Double {
    /// `script` is told the action and the request, and says the answer.
    ///
    /// # Errors
    /// Nothing can be bound on loopback.
    pub fn start(api: Api, script: impl FnMut(&str, &Value) -> Said + Send + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let shared = Arc::new(Mutex::new(Shared { script: Box::new(script), asked: Vec::new() }));
        let double = Self { api, addr: listener.local_addr()?, shared: shared.clone() };
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that goes away is its own business.
                thread::spawn(move || serve(stream, &shared).ok());
            }
        });
        Ok(double)
    }

    /// From now on it answers so.
    pub fn change(&self, script: impl FnMut(&str, &Value) -> Said + Send + 'static) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).script = Box::new(script);
    }

    #[must_use]
    pub fn address(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Everything that was asked so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Question> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).asked.clone()
    }

    /// Whether what was asked, and what was answered well, is what AWS's description of the API permits. An answer with
    /// a key that the API does not have, or without one that it must have, is a fault of the test.
    ///
    /// # Errors
    /// It is not; the text says what.
    pub fn judge(&self) -> Result<()> {
        let asked = self.asked();
        ensure!(!asked.is_empty(), "nothing was asked");
        let exchange = |it: &Question| {
            let said = if let Said::Ok(said) = &it.said { said.clone() } else { Value::Null };
            json!({ "action": it.action, "request": it.body, "answer": said })
        };
        let file = std::env::temp_dir().join(format!("mesh-test-{}-{}.json", std::process::id(), self.addr.port()));
        let all: Vec<Value> = asked.iter().map(exchange).collect();
        std::fs::write(&file, json!(all).to_string())?;
        let judged = super::python()?.args(["-c", JUDGE, self.api.name()]).arg(&file).output();
        std::fs::remove_file(&file)?;
        let judged = judged.context("cannot start Python")?;
        let said = String::from_utf8_lossy(&judged.stdout) + String::from_utf8_lossy(&judged.stderr);
        ensure!(judged.status.success(), "{said}");
        Ok(())
    }
}

/// Validates each request and answer by the shapes of botocore's description; times are numbers on this wire.
const JUDGE: &str = r#"
import datetime, json, sys
import botocore.session
from botocore.validate import ParamValidator

model = botocore.session.get_session().get_service_model(sys.argv[1])
bad = []

def times(shape, value):
    if value is None:
        return None
    if shape.type_name == 'structure' and isinstance(value, dict):
        return {k: times(shape.members[k], v) if k in shape.members else v for k, v in value.items()}
    if shape.type_name == 'list' and isinstance(value, list):
        return [times(shape.member, v) for v in value]
    if shape.type_name == 'timestamp' and isinstance(value, (int, float)):
        return datetime.datetime.fromtimestamp(value, datetime.timezone.utc)
    return value

def judge(what, shape, value):
    if value is None:
        return
    if shape is None:
        bad.append(f'{what}: there is nothing to say')
        return
    report = ParamValidator().validate(times(shape, value), shape)
    if report.has_errors():
        bad.append(f'{what}: {report.generate_report()} in {json.dumps(value)}')

for exchange in json.load(open(sys.argv[2])):
    action = exchange['action']
    operation = model.operation_model(action)
    judge(f'request {action}', operation.input_shape, exchange['request'])
    judge(f'answer {action}', operation.output_shape, exchange['answer'])
print('\n'.join(sorted(set(bad))))
sys.exit(1 if bad else 0)
"#;

fn serve(stream: TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    let mut output = stream;
    loop {
        let (mut length, mut action, mut first) = (0, String::new(), true);
        loop {
            let mut line = String::new();
            if input.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end();
            if line.is_empty() && !first {
                break;
            }
            first = false;
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            match key.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().unwrap_or(0),
                "x-amz-target" => action = value.rsplit('.').next().unwrap_or_default().trim().to_owned(),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        input.read_exact(&mut body)?;
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let said = {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let said = (shared.script)(&action, &body);
            shared.asked.push(Question { action, body, at: Instant::now(), said: said.clone() });
            said
        };
        let (status, text) = match said {
            // An action without an answer of its own.
            Said::Ok(Value::Null) => (200, String::new()),
            Said::Ok(value) => (200, value.to_string()),
            Said::Error(status, code, message) => (status, json!({ "__type": code, "message": message }).to_string()),
            Said::Raw(status, text) => (status, text.to_owned()),
            Said::Nothing => {
                // Until the client loses its patience.
                input.get_ref().set_read_timeout(Some(Duration::from_secs(60)))?;
                let _closed = input.fill_buf();
                return Ok(());
            }
        };
        let kind = "application/x-amz-json-1.1";
        write!(
            output,
            "HTTP/1.1 {status} Said\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )?;
    }
}
