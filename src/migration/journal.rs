//! The journal: what this side durably knows of one migration attempt.
//!
//! Invariant: `append` returns without an error only when the record, and the file's name, are on the
//! disk; what is read back is a prefix of what was appended. One file per attempt, one record per
//! line: 16 hex digits (the first 8 bytes of the BLAKE3 of the JSON) `' '` JSON `'\n'`. A torn or
//! damaged tail is recognised by its hash and cut; nothing behind it is believed. The first record
//! names the format; a file of a newer one is an error and is left alone.
//!
//! Room for every later record is reserved when a journal begins: a disk that is full then begins no
//! attempt, and one that fills up later stops none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::handover::{SourceRecord, TargetRecord};
use super::message::JobId;
use crate::hypervisor::VmSpec;

/// No journal of one attempt is larger; a larger file is not ours.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;
/// What this program writes; it reads no newer one.
const FORMAT: u32 = 1;
/// More than all steps of one attempt take, each with a reason of some sentences.
const RESERVED_BYTES: u64 = 16 << 10;
/// Longest reason that is written down.
const REASON_CHARS_MAX: usize = 600;

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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum Record {
    /// The attempt began; always the first record.
    Began(Box<Began>),
    /// A source's step of the hand-over.
    Source {
        /// The step.
        step: SourceRecord,
        /// Wall-clock time in RFC 3339, for people.
        at: String,
    },
    /// A target's step of the hand-over.
    Target {
        /// The step.
        step: TargetRecord,
        /// Why, for a refusal.
        reason: Option<String>,
        /// Whether the guest is to run here; `false` if its owner had paused it.
        run: bool,
        /// Wall-clock time in RFC 3339, for people.
        at: String,
    },
    /// Everything that follows from the last step was done; nothing is left to recover.
    Ended,
}

/// The first record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Began {
    /// The format of all that follows.
    pub format: u32,
    /// Which half we play.
    pub role: Role,
    /// The VM.
    pub vm: String,
    /// The peer's name at this host.
    pub peer: String,
    /// Whether the guest ran when the attempt began; it is given back like that.
    pub was_running: bool,
    /// At its target: what the VM is, so that it can be started from its disks if need be.
    pub spec: Option<VmSpec>,
    /// Wall-clock time in RFC 3339, for people.
    pub at: String,
}

impl Record {
    /// The first record of an attempt at its source.
    pub fn leaving(vm: &str, peer: &str, was_running: bool) -> Self {
        Self::began(Role::Source, vm, peer, was_running, None)
    }

    /// The first record of an attempt at its target.
    pub fn arriving(spec: &VmSpec, peer: &str) -> Self {
        Self::began(Role::Target, &spec.name, peer, false, Some(spec.clone()))
    }

    fn began(role: Role, vm: &str, peer: &str, was_running: bool, spec: Option<VmSpec>) -> Self {
        let (vm, peer, at) = (vm.to_owned(), peer.to_owned(), now());
        Self::Began(Box::new(Began { format: FORMAT, role, vm, peer, was_running, spec, at }))
    }

    /// A source's step.
    pub fn source(step: SourceRecord) -> Self {
        Self::Source { step, at: now() }
    }

    /// A target's step.
    pub fn target(step: TargetRecord, reason: Option<&str>, run: bool) -> Self {
        let cut = |reason: &str| reason.chars().take(REASON_CHARS_MAX).collect();
        Self::Target { step, reason: reason.map(cut), run, at: now() }
    }
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// Why a record is not durable.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// It is not on the disk and never will be.
    #[error("the journal cannot be written")]
    Unwritten(#[source] io::Error),
    /// It may be on the disk: what a failed fsync left behind is not known.
    #[error("the journal was written, and the disk does not say whether it holds it")]
    Unknown(#[source] io::Error),
}

/// Why no journal was begun; nothing of it stays.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// It cannot be written.
    #[error("its journal cannot be written")]
    Io(#[from] io::Error),
    /// An earlier attempt could still do something to this VM.
    #[error("an earlier attempt to move it ({0}) is not settled: `longhaul status` shows it")]
    Unsettled(JobId),
}

/// What a journal file says, read back.
#[derive(Debug, Clone, PartialEq)]
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
            Record::Source { step, .. } => Some(*step),
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

    /// Whether the guest is to run at its target, as it accepted it.
    pub fn runs_at_target(&self) -> bool {
        let accepted = |record: &Record| {
            matches!(record, Record::Target { step: TargetRecord::Accepted, run: true, .. })
        };
        self.records.iter().any(accepted)
    }

    /// The last reason that was written down.
    pub fn reason(&self) -> Option<String> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Target { reason, .. } => reason.clone(),
            _ => None,
        })
    }

    /// When its last step was written, in RFC 3339.
    pub fn since(&self) -> Option<&str> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Began(began) => Some(began.at.as_str()),
            Record::Source { at, .. } | Record::Target { at, .. } => Some(at),
            Record::Ended => None,
        })
    }

    /// Whether nothing is left to do. A step behind the end opens an attempt again: a target that
    /// hears late that it was overruled.
    pub fn ended(&self) -> bool {
        self.records.last() == Some(&Record::Ended)
    }

    /// The first record, without which a journal says nothing.
    pub fn began(&self) -> Option<&Began> {
        match self.records.first() {
            Some(Record::Began(began)) => Some(began),
            _ => None,
        }
    }

    /// Whether a restart would still do something to the VM because of this attempt. Until it would
    /// not, nothing else may be begun with that VM.
    pub fn acts(&self) -> bool {
        let tells_only = matches!(
            (self.source_step(), self.target_step()),
            (Some(SourceRecord::Returned | SourceRecord::Left), _)
                | (_, Some(TargetRecord::Settled | TargetRecord::Yielded))
        );
        !self.ended() && !tells_only
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

    /// Starts the journal of a new attempt; its first record is durable on return, and there is room
    /// for all others.
    ///
    /// # Errors
    /// Nothing was begun, and nothing of it stays.
    pub fn begin(&self, job: JobId, vm: &str, began: &Record) -> Result<(), BeginError> {
        for history in self.unfinished()? {
            if history.began().is_some_and(|began| began.vm == vm) && history.acts() {
                return Err(BeginError::Unsettled(history.job));
            }
        }
        let path = self.path(job);
        let mut file = OpenOptions::new().append(true).create_new(true).open(&path)?;
        let line = encode(began)?;
        let begun = reserve(&file, line.len() as u64 + RESERVED_BYTES)
            .and_then(|()| file.write_all(line.as_bytes()))
            .and_then(|()| file.sync_all())
            .and_then(|()| self.sync_names());
        if let Err(error) = begun {
            // If it stays after all, it tells a restart of an attempt that never was.
            let _ = fs::remove_file(&path);
            return Err(error.into());
        }
        Ok(())
    }

    /// Makes `record` durable in the journal of an attempt, which need not be known. A torn tail is
    /// cut first. The file is opened each time: what holds is what is on the disk now.
    ///
    /// # Errors
    /// The two kinds differ in what a restart may read.
    pub fn append(&self, job: JobId, record: &Record) -> Result<(), AppendError> {
        let path = self.path(job);
        let known = path.exists();
        let (mut file, good) = self.open_at_end(&path).map_err(AppendError::Unwritten)?;
        let line = encode(record).map_err(AppendError::Unwritten)?;
        // Its last byte is its end: a record that was written in part is none.
        file.write_all(line.as_bytes()).map_err(AppendError::Unwritten)?;
        let synced = file.sync_all().and_then(|()| if known { Ok(()) } else { self.sync_names() });
        synced.map_err(|error| match file.set_len(good).and_then(|()| file.sync_all()) {
            Ok(()) => AppendError::Unwritten(error),
            Err(_) => AppendError::Unknown(error),
        })?;
        if *record == Record::Ended {
            // Gives back what was reserved; if it cannot be, it only takes room.
            let _ = file.set_len(good + line.len() as u64);
        }
        Ok(())
    }

    /// Opens a journal behind its last readable record, whose end is given.
    fn open_at_end(&self, path: &Path) -> io::Result<(File, u64)> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        let (_, good) = read_records(&mut file)?;
        // Only if need be: it gives back the room that was reserved.
        if file.metadata()?.len() != good {
            file.set_len(good)?;
        }
        file.seek(SeekFrom::Start(good))?;
        Ok((file, good))
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
        let mut found = self.all()?;
        found.retain(|history| !history.ended());
        found.sort_by_key(|history| history.job.to_string());
        Ok(found)
    }

    /// The attempt that last brought a VM here, or may have taken it away; the others (seeds, tries
    /// that were given up) have left it where it was.
    pub fn newest(&self, vm: &str) -> io::Result<Option<JobId>> {
        let time = |history: &History| {
            let began = history.began().filter(|began| began.vm == vm)?;
            let moves = began.role == Role::Target || history.source_step().is_some();
            moves.then(|| began.at.parse::<jiff::Timestamp>().ok())?
        };
        let all = self.all()?;
        let timed = all.iter().filter_map(|history| Some((time(history)?, history.job)));
        Ok(timed.max_by_key(|(time, _)| *time).map(|(_, job)| job))
    }

    fn all(&self) -> io::Result<Vec<History>> {
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
            found.extend(self.read(job)?);
        }
        Ok(found)
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

/// Reserves room behind the end of an empty file, where the file system can.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        reserved => Ok(reserved?),
    }
}

fn encode(record: &Record) -> io::Result<String> {
    let json = serde_json::to_string(record).map_err(io::Error::other)?;
    Ok(format!("{} {json}\n", checksum(json.as_bytes())))
}

/// The readable records and the length of the file up to their end.
fn read_records(file: &mut File) -> io::Result<(Vec<Record>, u64)> {
    let mut bytes = Vec::new();
    file.take(MAX_JOURNAL_BYTES).read_to_end(&mut bytes)?;
    let mut records = Vec::new();
    let mut good = 0;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Some(json) = checked(line) else { break };
        refuse_newer(json)?;
        let Ok(record) = serde_json::from_str(json) else { break };
        records.push(record);
        good += line.len() as u64;
    }
    Ok((records, good))
}

/// A line's JSON, if it is as it was written.
fn checked(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = line.split_once(' ')?;
    (sum == checksum(json.as_bytes())).then_some(json)
}

/// What a newer program wrote is not torn: cutting it would forget a hand-over.
fn refuse_newer(json: &str) -> io::Result<()> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        format: u32,
    }
    match serde_json::from_str::<Head>(json) {
        Ok(Head { format }) if format > FORMAT => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("a journal has format {format} and this longhaul reads {FORMAT}: update it"),
        )),
        _ => Ok(()),
    }
}

fn checksum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn began() -> Record {
        Record::leaving("web", "dc2", true)
    }

    fn step(step: SourceRecord) -> Record {
        Record::source(step)
    }

    #[test]
    fn what_was_appended_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        journals.begin(job, "web", &began()).unwrap();
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        let unfinished = journals.unfinished().unwrap();
        assert_eq!(unfinished.len(), 1);
        assert_eq!(unfinished[0].source_step(), Some(SourceRecord::Delegated));
        journals.append(job, &Record::Ended).unwrap();
        assert!(journals.unfinished().unwrap().is_empty());
    }

    #[test]
    fn room_is_reserved_while_an_attempt_lasts() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let room = || fs::metadata(journals.path(job)).unwrap().blocks() * 512;
        journals.begin(job, "web", &began()).unwrap();
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        assert!(room() >= RESERVED_BYTES, "{}: no file system of ours", room());
        journals.append(job, &Record::Ended).unwrap();
        assert!(room() < RESERVED_BYTES, "{}", room());
    }

    #[test]
    fn a_tail_torn_at_any_byte_is_cut_and_appending_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let began = began();
        journals.begin(job, "web", &began).unwrap();
        let first = fs::metadata(journals.path(job)).unwrap().len();
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        let whole = fs::read(journals.path(job)).unwrap();
        for cut in first..whole.len() as u64 {
            fs::write(journals.path(job), &whole[..cut as usize]).unwrap();
            let records = journals.read(job).unwrap().unwrap().records;
            assert_eq!(records, std::slice::from_ref(&began), "cut at {cut}");
            journals.append(job, &step(SourceRecord::Gone)).unwrap();
            let history = journals.read(job).unwrap().unwrap();
            assert_eq!(history.source_step(), Some(SourceRecord::Gone), "cut at {cut}");
        }
    }

    #[test]
    fn nothing_behind_a_damaged_record_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let began = began();
        journals.begin(job, "web", &began).unwrap();
        let first = fs::metadata(journals.path(job)).unwrap().len() as usize;
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        journals.append(job, &Record::Ended).unwrap();
        let mut bytes = fs::read(journals.path(job)).unwrap();
        bytes[first + 20] ^= 1;
        fs::write(journals.path(job), &bytes).unwrap();
        assert_eq!(journals.read(job).unwrap().unwrap().records, [began]);
    }

    #[test]
    fn what_a_newer_program_wrote_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        let json = r#"{"record":"began","format":2,"role":"source","colour":"red"}"#;
        let line = format!("{} {json}\n", checksum(json.as_bytes()));
        fs::write(journals.path(job), &line).unwrap();
        assert!(journals.unfinished().unwrap_err().to_string().contains("format 2"));
        assert!(journals.append(job, &Record::Ended).is_err());
        assert_eq!(fs::read_to_string(journals.path(job)).unwrap(), line);
    }

    #[test]
    fn nothing_is_begun_while_an_earlier_attempt_could_act() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let [first, second] = [JobId::random(), JobId::random()];
        journals.begin(first, "web", &began()).unwrap();
        journals.append(first, &step(SourceRecord::Delegated)).unwrap();
        let refused = journals.begin(second, "web", &began()).unwrap_err();
        assert!(matches!(refused, BeginError::Unsettled(job) if job == first), "{refused}");
        assert!(journals.read(second).unwrap().is_none());
        // Another VM is another matter, and what only has to be told is none.
        journals.begin(JobId::random(), "db", &Record::leaving("db", "dc2", true)).unwrap();
        journals.append(first, &step(SourceRecord::Returned)).unwrap();
        journals.begin(second, "web", &began()).unwrap();
    }
}
