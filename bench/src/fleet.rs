//! Several Longhaul hosts at both ends of a WAN, one of which plans for all.
//!
//! Invariant: every agent trusts every other by its fingerprint under the name that it has here, and all
//! but the first obey the first.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::{self, Agent, POLL_PERIOD, Place, ask, images, longhaul_binary, status};
use crate::guest::Guest;
use crate::host::{PORT, description};
use crate::netns::Side;
use crate::wan::Wan;

/// The hosts.
#[derive(Debug)]
pub struct Fleet {
    program: PathBuf,
    agents: Vec<Agent>,
    killed: BTreeSet<String>,
}

/// How a fleet is set up.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    /// Name and side of each host. The first one plans.
    pub hosts: &'a [(&'a str, Side)],
    /// Everything lies below it, in a folder for each host.
    pub folder: &'a Path,
    /// A folder that `bench/setup/qemu` printed.
    pub qemu: &'a Path,
    /// QEMU's accelerator.
    pub accel: &'a str,
    /// `[scheduler]` of the first host, without `hosts`.
    pub rules: toml::Table,
    /// Cores that VMs may use at each host.
    pub cores: f64,
}

impl Fleet {
    /// Starts all agents and pairs each with each.
    ///
    /// # Errors
    ///
    /// When an agent does not start or answer; its log is `agent.log` in its folder.
    pub fn start(wan: &Wan, setup: &Setup<'_>) -> Result<Self> {
        let program = longhaul_binary()?;
        let names: Vec<toml::Value> = setup.hosts.iter().map(|(name, _)| (*name).into()).collect();
        let mut agents = Vec::new();
        for (number, (name, side)) in (0..).zip(setup.hosts) {
            let mut rules = if number == 0 { setup.rules.clone() } else { toml::Table::new() };
            rules.insert("cores".to_owned(), setup.cores.into());
            // Samples are as close as plans are.
            rules.extend(
                setup.rules.get_key_value("interval_s").map(|(k, v)| (k.clone(), v.clone())),
            );
            if number == 0 {
                rules.insert("hosts".to_owned(), names[1..].to_vec().into());
            } else {
                rules.insert("obeys".to_owned(), names[0].clone());
            }
            let folder = setup.folder.join(name);
            std::fs::create_dir_all(&folder)?;
            let place = Place { side: *side, port: PORT + number, name: (*name).to_owned() };
            let more = |config: &mut toml::Table| {
                config.insert("scheduler".to_owned(), rules.into());
            };
            agents.push(agent::start(
                wan,
                &program,
                place,
                &folder,
                (setup.qemu, setup.accel),
                more,
            )?);
        }
        agent::pair_all(&program, &agents)?;
        Ok(Self { program, agents, killed: BTreeSet::new() })
    }

    /// Starts a guest of this name at a host, on a disk of its own.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn start_vm(&self, host: &str, vm: &str, guest: &Guest) -> Result<()> {
        let agent = self.agent(host)?;
        let disk = guest.copy_disk(&images(&agent.folder))?;
        let named = disk.with_file_name(format!("{vm}.{}", guest.machine.format.name()));
        std::fs::rename(&disk, &named)?;
        let mut description = description(guest, &named)?;
        description["name"] = vm.into();
        agent.start_vm(&self.program, &description, &format!("{vm}.toml"))
    }

    /// Runs a command against one agent with `--json` and gives its last line.
    ///
    /// # Errors
    ///
    /// The command's own words.
    pub fn ask(&self, host: &str, arguments: &[&str]) -> Result<Value> {
        ask(&self.program, &self.agent(host)?.folder, arguments)
    }

    /// One agent's status.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn status(&self, host: &str) -> Result<Value> {
        status(&self.program, &self.agent(host)?.folder)
    }

    /// The hosts at which a VM of this name is in the book and runs; those whose agent was killed are
    /// not asked.
    ///
    /// # Errors
    ///
    /// An agent's own words.
    pub fn places(&self, vm: &str) -> Result<Vec<&str>> {
        let mut places = Vec::new();
        for agent in self.agents.iter().filter(|agent| !self.killed.contains(&agent.place.name)) {
            let vms = self.ask(&agent.place.name, &["vm", "list"])?;
            let is_it = |one: &Value| one["name"] == vm && one["state"] == "running";
            if vms.as_array().is_some_and(|vms| vms.iter().any(is_it)) {
                places.push(&*agent.place.name);
            }
        }
        Ok(places)
    }

    /// Waits until the VM runs at this host and nowhere else.
    ///
    /// # Errors
    ///
    /// When it does not get there in time.
    pub fn wait_at(&self, vm: &str, host: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let places = self.places(vm)?;
            if places == [host] {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{vm} is not at {host} but at {places:?}");
            std::thread::sleep(POLL_PERIOD);
        }
    }

    /// Ends one agent as a crash would, without a word. VMs run on.
    ///
    /// # Errors
    ///
    /// When there is none of that name, or it was gone before.
    pub fn kill(&mut self, host: &str) -> Result<()> {
        let agent = self.agents.iter_mut().find(|agent| agent.place.name == host);
        let agent = agent.context("no such host")?;
        agent.kill()?;
        self.killed.insert(host.to_owned());
        Ok(())
    }

    /// Starts an agent that was killed again, on what it left.
    ///
    /// # Errors
    ///
    /// When it does not start or answer.
    pub fn restart(&mut self, wan: &Wan, host: &str) -> Result<()> {
        let agent = self.agents.iter_mut().find(|agent| agent.place.name == host);
        let agent = agent.context("no such host")?;
        self.killed.remove(host);
        agent.restart(wan, &self.program)
    }

    /// What an agent has logged.
    pub fn log(&self, host: &str) -> String {
        let folder = self.agent(host).map(|agent| agent.folder.clone()).unwrap_or_default();
        std::fs::read_to_string(folder.join("agent.log")).unwrap_or_default()
    }

    fn agent(&self, host: &str) -> Result<&Agent> {
        self.agents.iter().find(|agent| agent.place.name == host).context("no such host")
    }
}
