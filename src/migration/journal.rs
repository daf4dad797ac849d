//! The journal: what this side durably knows of one migration attempt.
//!
//! Invariant: `append` returns only when the record, and the file's name, are on the disk; what is
//! read back is a prefix of what was appended. One file per attempt, one record per line:
//! 16 hex digits (the first 8 bytes of the BLAKE3 of the JSON) `' '` JSON `'\n'`. A torn or damaged
//! tail is recognised by its hash and cut; nothing behind it is believed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::handover::{SourceRecord, TargetRecord};
use super::message::JobId;

/// No journal of one attempt is larger; a larger file is not ours.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;

/// Which half of a migration this host plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VM leaves this host.
    Source,
    /// It arrives here.
    Target,
}

/// What a journal can say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum Record {
    /// The attempt began; always the first record.
    Began {
        /// Which half we play.
        role: Role,
        /// The VM.
        vm: String,
        /// The peer's name at this host.
        peer: String,
        /// Whether the guest ran when the attempt began; it is given back like that.
        was_running: bool,
        /// Wall-clock time in RFC 3339, for people.
        at: String,
    },
    /// A source's step of the hand-over.
    Source {
        /// The step.
        step: SourceRecord,
    },
    /// A target's step of the hand-over.
    Target {
        /// The step.
        step: TargetRecord,
        /// Why, for a refusal.
        reason: Option<String>,
    },
    /// Everything that follows from the last step was done; nothing is left to recover.
    Ended,
}

/// What a journal file says, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The attempt.
    pub job: JobId,
    /// Its records, oldest first.
    pub records: Vec<Record>,
}

impl History {
    /// The last step of the source's hand-over.
    pub fn source_step(&self) -> Option<SourceRecord> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Source { step } => Some(*step),
            _ => None,
        })
    }

    /// The last step of the target's hand-over.
    pub fn target_step(&self) -> Option<TargetRecord> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Target { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// Whether nothing is left to do.
    pub fn ended(&self) -> bool {
        self.records.contains(&Record::Ended)
    }

    /// Role, VM, peer and whether the guest ran, from the first record.
    pub fn began(&self) -> Option<(Role, &str, &str, bool)> {
        match self.records.first() {
            Some(Record::Began { role, vm, peer, was_running, .. }) => {
                Some((*role, vm, peer, *was_running))
            }
            _ => None,
        }
    }
}

/// The folder of a host's journals.
#[derive(Debug, Clone)]
pub struct JournalDir {
    dir: PathBuf,
}

impl JournalDir {
    /// Opens or makes the folder.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn path(&self, job: JobId) -> PathBuf {
        self.dir.join(format!("{job}.journal"))
    }

    /// Starts the journal of a new attempt; its first record is durable on return.
    pub fn begin(&self, job: JobId, began: &Record) -> io::Result<Journal> {
        let mut file = OpenOptions::new().append(true).create_new(true).open(self.path(job))?;
        write_record(&mut file, began)?;
        self.sync_names()?;
        Ok(Journal { file, broken: false })
    }

    /// Makes `record` durable in the journal of an attempt of which nothing else may be known.
    pub fn append(&self, job: JobId, record: &Record) -> io::Result<()> {
        let known = self.path(job).exists();
        let mut journal = self.reopen(job)?;
        journal.append(record)?;
        if known { Ok(()) } else { self.sync_names() }
    }

    /// Opens an attempt's journal for further records, cutting a torn tail.
    pub fn reopen(&self, job: JobId) -> io::Result<Journal> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path(job))?;
        let (_, good) = read_records(&mut file)?;
        file.set_len(good)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Journal { file, broken: false })
    }

    /// What an attempt's journal says; `None` if there is none.
    pub fn read(&self, job: JobId) -> io::Result<Option<History>> {
        let mut file = match File::open(self.path(job)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let (records, _) = read_records(&mut file)?;
        Ok(Some(History { job, records }))
    }

    /// Every attempt with something left to do.
    pub fn unfinished(&self) -> io::Result<Vec<History>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let Some(job) = name
                .to_str()
                .and_then(|name| name.strip_suffix(".journal"))
                .and_then(|job| job.parse::<JobId>().ok())
            else {
                continue;
            };
            match self.read(job)? {
                Some(history) if !history.ended() => found.push(history),
                _ => {}
            }
        }
        found.sort_by_key(|history| history.job.to_string());
        Ok(found)
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

/// One attempt's journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    file: File,
    broken: bool,
}

impl Journal {
    /// Makes `record` durable. After a failure nothing more is appended: what a failed write or
    /// fsync left behind is only known after a restart.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier write to this journal failed"));
        }
        let result = write_record(&mut self.file, record);
        self.broken = result.is_err();
        result
    }
}

fn write_record(file: &mut File, record: &Record) -> io::Result<()> {
    let json = serde_json::to_string(record).map_err(io::Error::other)?;
    let line = format!("{} {json}\n", checksum(json.as_bytes()));
    file.write_all(line.as_bytes())?;
    file.sync_all()
}

/// The readable records and the length of the file up to their end.
fn read_records(file: &mut File) -> io::Result<(Vec<Record>, u64)> {
    let mut bytes = Vec::new();
    file.take(MAX_JOURNAL_BYTES).read_to_end(&mut bytes)?;
    let mut records = Vec::new();
    let mut good = 0;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Some(record) = read_record(line) else { break };
        records.push(record);
        good += line.len() as u64;
    }
    Ok((records, good))
}

fn read_record(line: &[u8]) -> Option<Record> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = line.split_once(' ')?;
    (sum == checksum(json.as_bytes())).then(|| serde_json::from_str(json).ok())?
}

fn checksum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn began() -> Record {
        Record::Began {
            role: Role::Source,
            vm: "web".into(),
            peer: "dc2".into(),
            was_running: true,
            at: "2026-01-01T00:00:00Z".into(),
        }
    }

    #[test]
    fn what_was_appended_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let mut journal = journals.begin(job, &began()).unwrap();
        journal.append(&Record::Source { step: SourceRecord::Delegated }).unwrap();
        drop(journal);
        let unfinished = journals.unfinished().unwrap();
        assert_eq!(unfinished.len(), 1);
        assert_eq!(unfinished[0].source_step(), Some(SourceRecord::Delegated));
        journals.append(job, &Record::Ended).unwrap();
        assert!(journals.unfinished().unwrap().is_empty());
    }

    #[test]
    fn a_tail_torn_at_any_byte_is_cut_and_appending_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let mut journal = journals.begin(job, &began()).unwrap();
        let first = fs::metadata(journals.path(job)).unwrap().len();
        journal.append(&Record::Source { step: SourceRecord::Delegated }).unwrap();
        let whole = fs::read(journals.path(job)).unwrap();
        for cut in first..whole.len() as u64 {
            fs::write(journals.path(job), &whole[..cut as usize]).unwrap();
            assert_eq!(journals.read(job).unwrap().unwrap().records, [began()], "cut at {cut}");
            journals.append(job, &Record::Source { step: SourceRecord::Gone }).unwrap();
            let history = journals.read(job).unwrap().unwrap();
            assert_eq!(history.source_step(), Some(SourceRecord::Gone), "cut at {cut}");
        }
    }

    #[test]
    fn nothing_behind_a_damaged_record_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let mut journal = journals.begin(job, &began()).unwrap();
        let first = fs::metadata(journals.path(job)).unwrap().len() as usize;
        journal.append(&Record::Source { step: SourceRecord::Delegated }).unwrap();
        journal.append(&Record::Ended).unwrap();
        let mut bytes = fs::read(journals.path(job)).unwrap();
        bytes[first + 20] ^= 1;
        fs::write(journals.path(job), &bytes).unwrap();
        assert_eq!(journals.read(job).unwrap().unwrap().records, [began()]);
    }
}
