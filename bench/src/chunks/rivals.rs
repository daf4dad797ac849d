//! What other tools send for the same pair of images, each with the old one at its target.
//!
//! Invariant: a tool works on copies in a folder of its own, which goes with the measurement.
//!
//! Bytes are those that would cross a network: rsync says them itself; casync and borg fetch or store
//! what is new in their repository, so it is what the repository grew by; zstd's are its output.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::coding::Coded;
use super::image::Image;

/// A tool, with the way of using it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Rival {
    /// `rsync --inplace -z --zc=zstd`, blocks as long as it chooses.
    Rsync,
    /// The same with blocks of 4 KiB.
    #[value(name = "rsync-4k")]
    Rsync4k,
    /// casync, chunks of 64 KiB.
    Casync,
    /// borg, as it comes: chunks of 2 MiB, zstd 3.
    Borg,
    /// borg with chunks of 64 KiB.
    #[value(name = "borg-64k")]
    Borg64k,
    /// `zstd -19 --long=27` of the whole new image, without the old one.
    #[value(name = "zstd-19")]
    Zstd19,
    /// `zstd -3 --long=27` of the whole new image.
    #[value(name = "zstd-3")]
    Zstd3,
    /// `zstd -19 --long=31 --patch-from`: has both images at the source.
    #[value(name = "patch-19")]
    Patch19,
    /// `zstd -3 --long=31 --patch-from`.
    #[value(name = "patch-3")]
    Patch3,
}

impl Rival {
    /// As it is called on the command line and in rows.
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self).expect("no rival is hidden");
        value.get_name().to_owned()
    }

    /// Whether it is given both images at the source.
    pub fn is_patch(self) -> bool {
        matches!(self, Self::Patch19 | Self::Patch3)
    }
}

/// Clock ticks of /proc, in a second.
const TICKS_PER_S: f64 = 100.0;

/// What a rival sends to bring the new image to where the old one is, and its processor time.
///
/// # Errors
///
/// When the tool is not installed or fails.
pub fn measure(rival: Rival, old: &Path, new: &Path, work: &Path) -> Result<Coded> {
    let folder = tempfile::tempdir_in(work).context("while making a folder")?;
    let job = Job { old, new, folder: folder.path() };
    match rival {
        Rival::Rsync => job.rsync(&[]),
        Rival::Rsync4k => job.rsync(&["--block-size=4096"]),
        Rival::Casync => job.casync(),
        Rival::Borg => job.borg("buzhash,19,23,21,4095"),
        Rival::Borg64k => job.borg("buzhash,14,18,16,4095"),
        Rival::Zstd19 => job.zstd("-19", false),
        Rival::Zstd3 => job.zstd("-3", false),
        Rival::Patch19 => job.zstd("-19", true),
        Rival::Patch3 => job.zstd("-3", true),
    }
}

/// The tool's version in its own words.
///
/// # Errors
///
/// When it is not installed.
pub fn version(rival: Rival) -> Result<String> {
    let name = match rival {
        Rival::Rsync | Rival::Rsync4k => "rsync",
        Rival::Casync => "casync",
        Rival::Borg | Rival::Borg64k => "borg",
        Rival::Zstd19 | Rival::Zstd3 | Rival::Patch19 | Rival::Patch3 => "zstd",
    };
    let text = run(Command::new(name).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

struct Job<'a> {
    old: &'a Path,
    new: &'a Path,
    folder: &'a Path,
}

impl Job<'_> {
    fn rsync(&self, more: &[&str]) -> Result<Coded> {
        let target = self.folder.join("image");
        run(Command::new("cp").arg("--sparse=always").arg(self.old).arg(&target))?;
        let (text, cpu_s) = timed(
            Command::new("rsync")
                .args(["--inplace", "--no-whole-file", "--ignore-times", "-z", "--zc=zstd"])
                .args(["--stats", "--no-human-readable"])
                .args(more)
                .arg(self.new)
                .arg(&target),
        )?;
        let said = |what: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(what));
            let number = line.with_context(|| format!("rsync does not say {what:?}"))?;
            Ok(number.trim().replace(',', "").parse()?)
        };
        let bytes = said("Total bytes sent:")? + said("Total bytes received:")?;
        self.is_same(&target)?;
        Ok(Coded { bytes, cpu_s })
    }

    fn is_same(&self, target: &Path) -> Result<()> {
        run(Command::new("cmp").arg(self.new).arg(target)).map(drop)
    }

    fn casync(&self) -> Result<Coded> {
        let store = self.folder.join("store.castr");
        // Of an empty image it makes none.
        fs::create_dir(&store)?;
        let make = |image: &Path, index: &str| {
            let mut command = Command::new("casync");
            command.arg("make").arg("--what=blob-index").arg("--store").arg(&store);
            command.arg(self.folder.join(index)).arg(image);
            timed(&mut command)
        };
        make(self.old, "old.caibx")?;
        let before = folder_bytes(&store)?;
        let (_, cpu_s) = make(self.new, "new.caibx")?;
        let index = fs::metadata(self.folder.join("new.caibx"))?.len();
        Ok(Coded { bytes: folder_bytes(&store)? - before + index, cpu_s })
    }

    fn borg(&self, chunker: &str) -> Result<Coded> {
        let repository = self.folder.join("repository");
        let borg = || {
            let mut command = Command::new("borg");
            command.env("BORG_BASE_DIR", self.folder).current_dir(self.folder);
            command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
            command
        };
        run(borg().args(["init", "-e", "none"]).arg(&repository))?;
        let create = |name: &str, image: &Path| {
            let mut command = borg();
            command.args(["create", "--compression", "zstd,3", "--files-cache", "disabled"]);
            command.args(["--chunker-params", chunker]);
            command.arg(format!("{}::{name}", repository.display())).arg(image);
            timed(&mut command)
        };
        create("old", self.old)?;
        let before = folder_bytes(&repository)?;
        let (_, cpu_s) = create("new", self.new)?;
        // Its own indexes are made anew and are not sent.
        Ok(Coded { bytes: folder_bytes(&repository)?.saturating_sub(before), cpu_s })
    }

    fn zstd(&self, level: &str, patch: bool) -> Result<Coded> {
        // Only what is not zero: a window of 2 GiB does not hold an image's holes.
        let data = |image: &Path, name: &str| -> Result<PathBuf> {
            let path = self.folder.join(name);
            fs::write(&path, Image::read(image)?.data())?;
            Ok(path)
        };
        let (new, out) = (data(self.new, "new")?, self.folder.join("out"));
        let mut command = Command::new("zstd");
        command.args([level, "-q", "-T1", "--no-check"]);
        if patch {
            let mut from = std::ffi::OsString::from("--patch-from=");
            from.push(data(self.old, "old")?);
            command.arg("--long=31").arg(from);
        } else {
            command.arg("--long=27");
        }
        let (_, cpu_s) = timed(command.arg(new).arg("-o").arg(&out))?;
        Ok(Coded { bytes: fs::metadata(out)?.len(), cpu_s })
    }
}

fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| {
        format!("while running {name}: `bench/setup/packages casync borgbackup` installs it")
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command; gives what it printed, and the processor time of it and its children.
fn timed(command: &mut Command) -> Result<(String, f64)> {
    let before = children_cpu_s()?;
    let text = run(command)?;
    Ok((text, children_cpu_s()? - before))
}

/// Processor time of all children that ended, theirs included.
fn children_cpu_s() -> Result<f64> {
    let text = fs::read_to_string("/proc/self/stat").context("while reading /proc/self/stat")?;
    let (_, fields) = text.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks: Vec<f64> =
        fields.split_whitespace().skip(13).take(2).filter_map(|field| field.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Ok((user + system) / TICKS_PER_S),
        _ => bail!("/proc/self/stat says nothing of children"),
    }
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.metadata()?;
        bytes += if kind.is_dir() { folder_bytes(&entry.path())? } else { kind.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_s_time_is_counted_and_a_folder_s_bytes_are_all() {
        let (text, cpu_s) = timed(Command::new("sh").args(["-c", "echo well"])).unwrap();
        assert_eq!(text, "well\n");
        assert!((0.0..1.0).contains(&cpu_s));
        assert!(run(&mut Command::new("false")).is_err());
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/a"), [0; 10]).unwrap();
        fs::write(folder.path().join("b"), [0; 5]).unwrap();
        assert_eq!(folder_bytes(folder.path()).unwrap(), 15);
    }
}
