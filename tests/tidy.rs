//! What holds for every file of the tree: who may import whom, how files begin, how long they are.
//!
//! Invariant: a rule of the house is a test here, with its reason, or it is no rule.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that a file may have, tests included.
const LINES_MAX: usize = 800;
/// Lines from which on a file should be split; only said, not refused.
const LINES_LONG: usize = 500;

/// What may stand at the top of the tree, besides dot-files.
const TOP_LEVEL: [&str; 10] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "bench",
    "dedup",
    "docs",
    "src",
    "tests",
    "transport",
];

/// Names that say nothing about what is inside.
const MEANINGLESS: [&str; 5] = ["utils", "util", "common", "helpers", "misc"];

/// Modules of the product, each with the modules and crates that it may name. The order is that of
/// the imports: main -> {cli, agent} -> scheduler -> control -> migration -> {hypervisor, transport}
/// -> dedup. `units`, `calendar` and `config` are values that the upper layers share.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("main", &["agent", "allocator", "cli", "config", "control", "scheduler"]),
    (
        "agent",
        &[
            "calendar",
            "config",
            "control",
            "hypervisor",
            "longhaul_dedup",
            "longhaul_scheduler",
            "longhaul_transport",
            "migration",
            "scheduler",
            "units",
        ],
    ),
    ("cli", &["calendar", "config", "control", "longhaul_scheduler", "migration", "units"]),
    ("scheduler", &["control", "longhaul_transport", "migration", "units"]),
    ("control", &["calendar", "longhaul_scheduler", "longhaul_transport", "migration", "units"]),
    ("config", &["calendar", "hypervisor", "longhaul_transport", "units"]),
    ("calendar", &["longhaul_transport"]),
    ("migration", &["hypervisor", "longhaul_dedup", "longhaul_transport"]),
    ("hypervisor", &[]),
    ("units", &[]),
    ("allocator", &[]),
];

/// Files that take the time as an argument, or need none.
const WITHOUT_CLOCK: [&str; 9] = [
    "src/agent/admission.rs",
    "src/calendar/mod.rs",
    "src/calendar/text.rs",
    "src/migration/converge.rs",
    "src/migration/handover/mod.rs",
    "src/migration/handover/source.rs",
    "src/migration/handover/target.rs",
    "src/migration/report.rs",
    "src/units.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below the named folders, hidden ones and build output left out.
fn files(folders: &[&str], extensions: &[&str]) -> Vec<PathBuf> {
    fn visit(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with('.') || name == "target" {
                continue;
            }
            if path.is_dir() {
                visit(&path, extensions, found);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for folder in folders {
        visit(&root().join(folder), extensions, &mut found);
    }
    found.sort();
    assert!(!found.is_empty(), "no files in {folders:?}");
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// Code without line comments; strings stay, they name no modules.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap_or("").to_owned() + "\n").collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What follows each `prefix::` in `code`: the next word, or all first words of a `{}` group, each
/// with the word after it (`hypervisor::qemu`) if there is one.
fn named_after(code: &str, prefix: &str) -> Vec<String> {
    let mut named = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let rest = code[at + prefix.len()..].trim_start();
        match rest.strip_prefix('{') {
            Some(group) => named.extend(group_heads(group)),
            None => named.push(head(rest)),
        }
    }
    named
}

/// `a::b::c` gives `a::b`; `a` gives `a`.
fn head(path: &str) -> String {
    let mut words = path.split("::").map(|word| word.trim().split(|c| !is_word(c)).next().unwrap());
    let first = words.next().unwrap_or("");
    match words.next() {
        Some(second) if path[first.len()..].starts_with("::") && !second.is_empty() => {
            format!("{first}::{second}")
        }
        _ => first.to_owned(),
    }
}

fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut start, mut heads) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                heads.push(head(group[start..at].trim()));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

/// Everything of the house that a file of the product names, as `module` or `module::item`.
fn imports(path: &Path) -> BTreeSet<String> {
    let code = code(path);
    let mut named: BTreeSet<String> = named_after(&code, "crate::").into_iter().collect();
    named.extend(named_after(&code, "longhaul::"));
    for neighbour in ["longhaul_transport", "longhaul_dedup"] {
        let items = named_after(&code, &format!("{neighbour}::"));
        named.extend(items.iter().map(|item| format!("{neighbour}::{item}")));
    }
    // `super` as often as the file is deep leads to the crate's root.
    let inside = path.strip_prefix(root().join("src")).unwrap().with_extension("");
    let depth = inside.iter().filter(|part| *part != "mod").count();
    named.extend(named_after(&code, &"super::".repeat(depth)));
    named
}

fn module(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn imports_go_one_way() {
    let modules: BTreeSet<&str> = MAY_IMPORT.iter().map(|(module, _)| *module).collect();
    let mut wrong = Vec::new();
    for path in files(&["src"], &["rs"]) {
        let importer = module(&path);
        if importer == "lib" {
            continue;
        }
        let rule = MAY_IMPORT.iter().find(|(module, _)| *module == importer);
        let Some((_, allowed)) = rule else {
            wrong.push(format!("{}: no rule says what `{importer}` may import", shown(&path)));
            continue;
        };
        for named in imports(&path) {
            let to = named.split("::").next().unwrap();
            let ours = modules.contains(to) || to.starts_with("longhaul_");
            if ours && to != importer && !allowed.contains(&to) {
                wrong.push(format!("{}: `{importer}` may not import `{named}`", shown(&path)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn migration_knows_no_hypervisor_by_name() {
    for path in files(&["src/migration"], &["rs"]) {
        let named = imports(&path);
        assert!(!named.contains("hypervisor::qemu"), "{} names QEMU", shown(&path));
    }
}

#[test]
fn control_and_config_take_units_only_from_the_transport() {
    for path in files(&["src"], &["rs"]) {
        if matches!(module(&path).as_str(), "calendar" | "control" | "config") {
            for named in imports(&path).iter().filter(|named| named.starts_with("longhaul_")) {
                let rate = ["longhaul_transport::BitRate", "longhaul_transport::ParseBitRateError"];
                assert!(rate.contains(&named.as_str()), "{} imports {named}", shown(&path));
            }
        }
    }
}

#[test]
fn the_lower_crates_know_nothing_above_them() {
    for path in files(&["dedup/src"], &["rs"]) {
        let code = code(&path);
        for stranger in ["longhaul_transport", "longhaul::", "tokio", "async fn", "std::net"] {
            assert!(!code.contains(stranger), "{} names {stranger}", shown(&path));
        }
        for clock in ["Instant::now", "SystemTime::now"] {
            assert!(!code.contains(clock), "{} reads a clock", shown(&path));
        }
    }
    for path in files(&["src/scheduler"], &["rs"]) {
        let code = code(&path);
        let outside = ["tokio", "async fn", "std::net", "std::fs", "std::process", "std::env"];
        for stranger in outside.iter().chain(&["HashMap", "HashSet", "Instant", "SystemTime"]) {
            assert!(!code.contains(stranger), "{} names {stranger}", shown(&path));
        }
    }
    for path in files(&["transport/src"], &["rs"]) {
        let code = code(&path);
        assert!(!code.contains("longhaul::"), "{} names the product", shown(&path));
        for item in named_after(&code, "longhaul_dedup::") {
            let id = ["id", "ChunkId"].contains(&item.split("::").next().unwrap());
            assert!(id, "{} may know chunk ids only, and names {item}", shown(&path));
        }
    }
}

#[test]
fn decisions_take_the_time_as_an_argument() {
    for name in WITHOUT_CLOCK {
        let path = root().join(name);
        if !path.exists() {
            continue;
        }
        let code = code(&path);
        for clock in ["Instant::now", "SystemTime::now", "Timestamp::now", "Zoned::now"] {
            assert!(!code.contains(clock), "{name} reads a clock");
        }
    }
}

#[test]
fn every_file_opens_with_what_it_is() {
    for path in files(&["src", "transport", "dedup", "bench", "tests"], &["rs"]) {
        let text = fs::read_to_string(&path).unwrap();
        // A crate whose format has a page of its own has that page as its front.
        let opens = text.starts_with("//! ") || text.starts_with("#![doc = include_str!(");
        assert!(opens, "{} does not open with `//! `", shown(&path));
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let mut wrong = Vec::new();
    for path in files(&["src", "transport", "dedup", "bench", "tests"], &["rs"]) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{} has {lines} lines, at most {LINES_MAX} may be", shown(&path)));
        } else if lines > LINES_LONG {
            eprintln!("{} has {lines} lines: is it two things?", shown(&path));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn sources_are_ascii() {
    let mut wrong = Vec::new();
    for path in files(&["src", "transport", "dedup", "bench", "tests"], &["rs", "toml"]) {
        let text = fs::read_to_string(&path).unwrap();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.is_ascii()) {
            wrong.push(format!("{}:{}: {line}", shown(&path), index + 1));
        }
    }
    assert!(wrong.is_empty(), "not ASCII:\n{}", wrong.join("\n"));
}

#[test]
fn the_top_level_stays_small() {
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = name.starts_with('.') || name == "target" || TOP_LEVEL.contains(&&*name);
        assert!(known, "`{name}` does not belong at the top level: {TOP_LEVEL:?}");
    }
}

#[test]
fn names_say_what_is_inside() {
    for path in files(&["src", "transport", "dedup", "bench"], &["rs"]) {
        let inside = path.strip_prefix(root()).unwrap().with_extension("");
        let bad = inside.iter().find(|part| MEANINGLESS.iter().any(|name| part == name));
        assert!(bad.is_none(), "{} has a name that says nothing", shown(&path));
    }
}

#[test]
fn groups_and_paths_are_seen_through() {
    let code = "use crate::{a, hypervisor::{qemu, spec}, b::c::D};\nlet x = crate::control::chain(e);\n\
                use mycrate::z; use crate::units::ByteCount;";
    let named = named_after(code, "crate::");
    assert_eq!(named, ["a", "hypervisor", "b::c", "control::chain", "units::ByteCount"]);
}
