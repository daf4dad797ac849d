//! Jobs that ended: `history.jsonl`, one [`JobRecord`] per line, oldest first.
//!
//! Invariant: neither the file nor the memory grows without bound, and a line that makes no sense
//! (a crash in the middle of one, a newer agent's) costs that line and nothing else.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::durable;
use crate::control::{JobKind, JobOutcome, JobRecord};

/// Records that are kept.
const RECORDS_MAX: usize = 500;
/// Lines that the file may have before it is written anew with the newest [`RECORDS_MAX`].
const LINES_MAX: usize = 2 * RECORDS_MAX;

/// The jobs that ended lately.
#[derive(Debug)]
pub(crate) struct History {
    path: PathBuf,
    records: VecDeque<JobRecord>,
    lines: usize,
}

impl History {
    /// Reads `path`; a file that does not exist holds nothing.
    pub(crate) fn load(path: &Path) -> io::Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut history = Self { path: path.to_owned(), records: VecDeque::new(), lines: 0 };
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            history.lines += 1;
            match serde_json::from_slice(line) {
                Ok(record) => history.remember(record),
                Err(error) => tracing::warn!(line = history.lines, %error, "unreadable history"),
            }
        }
        if text.last().is_some_and(|byte| *byte != b'\n') {
            // The next record must not be appended to half a line.
            history.rewrite()?;
        }
        Ok(history)
    }

    /// Adds a record. A disk that does not take it is logged: the job has ended in any case.
    pub(crate) fn add(&mut self, record: JobRecord) {
        let written = self.append(&record);
        self.remember(record);
        let written = written.and_then(|()| match self.lines {
            ..=LINES_MAX => Ok(()),
            _ => self.rewrite(),
        });
        if let Err(error) = written {
            tracing::error!(file = %self.path.display(), %error, "cannot write the history");
        }
    }

    /// Up to `count` records, newest first.
    pub(crate) fn newest(&self, count: usize) -> Vec<JobRecord> {
        self.records.iter().rev().take(count).cloned().collect()
    }

    /// The newest migration that completed.
    pub(crate) fn last_migration(&self) -> Option<&JobRecord> {
        self.records.iter().rev().find(|record| {
            record.kind == JobKind::Migrate && matches!(record.outcome, JobOutcome::Completed(_))
        })
    }

    /// The record of that number.
    pub(crate) fn find(&self, id: u64) -> Option<&JobRecord> {
        self.records.iter().rev().find(|record| record.id == id)
    }

    /// The highest number that a job had.
    pub(crate) fn last_id(&self) -> u64 {
        self.records.iter().map(|record| record.id).max().unwrap_or(0)
    }

    fn remember(&mut self, record: JobRecord) {
        self.records.push_back(record);
        if self.records.len() > RECORDS_MAX {
            self.records.pop_front();
        }
    }

    fn append(&mut self, record: &JobRecord) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).open(&self.path)?.write_all(&line)?;
        self.lines += 1;
        Ok(())
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let mut text = Vec::new();
        for record in &self.records {
            serde_json::to_writer(&mut text, record)?;
            text.push(b'\n');
        }
        durable::write(&self.path, &text)?;
        self.lines = self.records.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Failure;

    fn record(id: u64) -> JobRecord {
        JobRecord {
            id,
            kind: JobKind::Seed,
            vm: "db1".into(),
            peer: "lyon".into(),
            started: jiff::Timestamp::UNIX_EPOCH,
            ended: jiff::Timestamp::UNIX_EPOCH,
            outcome: JobOutcome::Failed(Failure::refused("x", "y")),
        }
    }

    #[test]
    fn half_a_line_costs_that_line_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let mut history = History::load(&path).unwrap();
        history.add(record(1));
        history.add(record(2));
        let mut torn = std::fs::read(&path).unwrap();
        torn.truncate(torn.len() - 5);
        std::fs::write(&path, torn).unwrap();

        let mut history = History::load(&path).unwrap();
        assert_eq!(history.last_id(), 1);
        history.add(record(3));
        let ids = |history: &History| history.newest(9).iter().map(|r| r.id).collect::<Vec<_>>();
        assert_eq!(ids(&history), [3, 1]);
        assert_eq!(ids(&History::load(&path).unwrap()), [3, 1]);
    }

    #[test]
    fn the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let mut history = History::load(&path).unwrap();
        for id in 0..(LINES_MAX + 10) as u64 {
            history.add(record(id));
        }
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LINES_MAX, "{lines}");
        assert_eq!(history.newest(usize::MAX).len(), RECORDS_MAX);
        assert_eq!(History::load(&path).unwrap().last_id(), history.last_id());
    }
}
