//! The agent's token, read anew for each request: the kubelet replaces the file long before the token expires, and a
//! request with one that was replaced a moment ago would be refused, which at the agent's end is taken for its removal.
//!
//! Requests are few and the file is in memory, so nothing is kept but what to fall back on while it cannot be read.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use http::{HeaderValue, Request, header::AUTHORIZATION};

/// A file with a token.
#[derive(Clone, Debug)]
pub(super) struct Token {
    path: PathBuf,
    last: Arc<Mutex<HeaderValue>>,
}

impl Token {
    /// Fails if there is no token now.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            last: Arc::new(Mutex::new(read(path)?)),
        })
    }

    /// Puts the token on a request.
    pub(super) fn sign<B>(&self, mut request: Request<B>) -> Request<B> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.path) {
            Ok(now) => *last = now,
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "the last token read is used on");
            }
        }
        request.headers_mut().insert(AUTHORIZATION, last.clone());
        request
    }
}

fn read(path: &Path) -> io::Result<HeaderValue> {
    let text = fs::read_to_string(path)?;
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let token = text.trim();
    if token.is_empty() {
        return Err(invalid("the file is empty"));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| invalid("what it holds is no token"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(token: &Token) -> String {
        let request = token.sign(Request::new(()));
        request.headers()[AUTHORIZATION]
            .to_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn each_request_has_what_the_file_holds_then() {
        let path = std::env::temp_dir().join(format!("culvert-token-{}", std::process::id()));
        assert!(Token::open(&path).is_err());
        fs::write(&path, "one\n").unwrap();
        let token = Token::open(&path).unwrap();
        assert_eq!(signed(&token), "Bearer one");
        fs::write(&path, "two").unwrap();
        assert_eq!(signed(&token), "Bearer two");
        for content in ["", " \n", "no\u{1}token"] {
            fs::write(&path, content).unwrap();
            assert_eq!(signed(&token), "Bearer two", "{content:?} is none");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(signed(&token), "Bearer two", "gone for a moment");
    }
}
