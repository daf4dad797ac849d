//! The folder of journals: one file for each attempt, written so that a crash forgets nothing.
//!
//! Invariant: `append` returns without an error only when the record, all before it and the file's
//! name are on the disk; what is read back is a prefix of what was appended. One record per line: 16
//! hex digits (the first 8 bytes of the BLAKE3 of the JSON) `' '` JSON `'\n'`. A torn or damaged tail
//! is recognised by its hash and cut; nothing behind it is believed. The first record names the
//! format; a file of a newer one is an error and is left alone.
//!
//! What can be read is not always durable: a failed fsync leaves it in the kernel's cache, and marks
//! it there as written, so that a second fsync does nothing. Until this life of the agent has seen a
//! journal written whole it is therefore written over with its own bytes before anybody acts upon it.
//!
//! Room for every later record is reserved when a journal begins: a disk that is full then begins no
//! attempt, and one that fills up later stops none.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;

use super::{FORMAT, History, Record, Role};
use crate::migration::message::JobId;

/// No journal of one attempt is larger; a larger file is not ours.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;
/// More than all steps of one attempt take, each with a reason of some sentences.
const RESERVED_BYTES: u64 = 16 << 10;

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

/// The folder of a host's journals.
#[derive(Debug, Clone)]
pub struct JournalDir {
    dir: PathBuf,
    /// The journals that this life of the agent has seen durable, as they are.
    durable: Arc<Mutex<HashSet<JobId>>>,
    /// What was found ended: journals are kept, and there are ever more of them.
    ended: Arc<Mutex<Ended>>,
}

/// Journals that need not be read to know that nothing is left to do. Only this agent writes them.
#[derive(Debug, Default)]
struct Ended {
    jobs: HashSet<JobId>,
    /// Records appended so far: what was read before one may be no more.
    appended: u64,
}

impl JournalDir {
    /// Opens or makes the folder.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_path_buf(), durable: Arc::default(), ended: Arc::default() })
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
            if history.began().is_some_and(|began| began.vm == vm)
                && self.sure(history.job)?.is_some_and(|history| history.acts())
            {
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
        self.is_durable(job, true);
        Ok(())
    }

    /// Makes `record` durable in the journal of an attempt, which need not be known. A torn tail is
    /// cut first. The file is opened each time: what holds is what is on the disk now.
    ///
    /// # Errors
    /// The two kinds differ in what a restart may read.
    pub fn append(&self, job: JobId, record: &Record) -> Result<(), AppendError> {
        let appended = self.write_behind(job, record);
        // Whatever came of it: what was read before is no more.
        let mut ended = self.lock_ended();
        ended.jobs.remove(&job);
        ended.appended += 1;
        appended
    }

    fn write_behind(&self, job: JobId, record: &Record) -> Result<(), AppendError> {
        let line = encode(record).map_err(AppendError::Unwritten)?;
        let (mut file, good) = self.open_durable(job).map_err(AppendError::Unwritten)?;
        // Its last byte is its end: a record that was written in part is none.
        file.write_all(line.as_bytes()).map_err(AppendError::Unwritten)?;
        if let Err(error) = file.sync_all() {
            self.is_durable(job, false);
            return Err(match file.set_len(good).and_then(|()| file.sync_all()) {
                Ok(()) => AppendError::Unwritten(error),
                Err(_) => AppendError::Unknown(error),
            });
        }
        if *record == Record::Ended {
            // Gives back what was reserved; if it cannot be, it only takes room.
            let _ = file.set_len(good + line.len() as u64);
        }
        Ok(())
    }

    /// What an attempt's journal durably says, for whoever acts upon it; `None` if there is none.
    ///
    /// # Errors
    /// What it says is not known to be durable, or cannot be read.
    pub fn sure(&self, job: JobId) -> io::Result<Option<History>> {
        let known = self.lock_durable().contains(&job);
        if !known && self.path(job).exists() {
            self.open_durable(job)?;
        }
        self.read(job)
    }

    /// Opens a journal, or makes it, behind its last readable record, whose end is given and which
    /// is durable.
    fn open_durable(&self, job: JobId) -> io::Result<(File, u64)> {
        let mut options = OpenOptions::new();
        let path = self.path(job);
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        let (_, good) = read_records(&mut file)?;
        // Only if need be: it gives back the room that was reserved.
        if file.metadata()?.len() != good {
            file.set_len(good)?;
        }
        file.rewind()?;
        if self.lock_durable().contains(&job) {
            file.seek(SeekFrom::Start(good))?;
            return Ok((file, good));
        }
        // The same bytes over themselves: whatever of them reaches the disk, nothing gets lost.
        let mut bytes = vec![0; good as usize];
        file.read_exact(&mut bytes)?;
        file.rewind()?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        self.sync_names()?;
        self.is_durable(job, true);
        Ok((file, good))
    }

    fn is_durable(&self, job: JobId, is: bool) {
        let mut durable = self.lock_durable();
        let _ = if is { durable.insert(job) } else { durable.remove(&job) };
    }

    fn lock_durable(&self) -> MutexGuard<'_, HashSet<JobId>> {
        // Whole after every operation.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an attempt's journal says as far as it can be read, durable or not, for whoever only
    /// looks; `None` if there is none.
    pub fn read(&self, job: JobId) -> io::Result<Option<History>> {
        let mut file = match File::open(self.path(job)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let (records, _) = read_records(&mut file)?;
        Ok(Some(History { job, records }))
    }

    fn lock_ended(&self) -> MutexGuard<'_, Ended> {
        // Whole after every operation.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every attempt with something left to do.
    pub fn unfinished(&self) -> io::Result<Vec<History>> {
        let appended = self.lock_ended().appended;
        let mut found = self.all(|job| !self.lock_ended().jobs.contains(&job))?;
        {
            let mut ended = self.lock_ended();
            if ended.appended == appended {
                let over = found.iter().filter(|history| history.ended());
                ended.jobs.extend(over.map(|history| history.job));
            }
        }
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
        let all = self.all(|_| true)?;
        let timed = all.iter().filter_map(|history| Some((time(history)?, history.job)));
        Ok(timed.max_by_key(|(time, _)| *time).map(|(_, job)| job))
    }

    fn all(&self, is_wanted: impl Fn(JobId) -> bool) -> io::Result<Vec<History>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let Some(job) = name
                .to_str()
                .and_then(|name| name.strip_suffix(".journal"))
                .and_then(|job| job.parse::<JobId>().ok())
                .filter(|job| is_wanted(*job))
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
    use crate::migration::handover::SourceRecord;

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

    /// Journals are kept for ever: those that ended are not read again, until something is written behind
    /// their end.
    #[test]
    fn what_has_ended_is_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        journals.begin(job, "db1", &began()).unwrap();
        journals.append(job, &Record::Ended).unwrap();
        assert!(journals.unfinished().unwrap().is_empty());
        let path = journals.path(job);
        let aside = dir.path().join("aside");
        fs::rename(&path, &aside).unwrap();
        fs::write(&path, "newer than this program").unwrap();
        assert!(journals.unfinished().unwrap().is_empty());
        fs::rename(&aside, &path).unwrap();
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        assert_eq!(journals.unfinished().unwrap().len(), 1);
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
    fn another_life_acts_only_upon_what_it_has_made_durable() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::open(dir.path()).unwrap();
        let job = JobId::random();
        journals.begin(job, "web", &began()).unwrap();
        journals.append(job, &step(SourceRecord::Delegated)).unwrap();
        let path = journals.path(job);
        let (said, bytes) = (journals.read(job).unwrap(), fs::read(&path).unwrap());
        let written = |journals: &JournalDir| {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
            assert_eq!(journals.sure(job).unwrap(), said);
            assert_eq!(fs::read(&path).unwrap(), bytes);
            fs::metadata(&path).unwrap().modified().unwrap() != std::time::UNIX_EPOCH
        };
        assert!(!written(&journals));
        let later = JournalDir::open(dir.path()).unwrap();
        assert!(written(&later) && !written(&later));
        assert_eq!(later.sure(JobId::random()).unwrap(), None);
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
