//! QEMU's command line, read back.
//!
//! Invariant: nothing is lost: every word of it ends up in an [`Opt`], every key of an option in its
//! [`Props`], and what nobody takes out of those can be told. Pure.

use serde_json::Value;

/// Deepest nesting of an option that is JSON.
const DEPTH_MAX: usize = 8;

/// One option of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opt {
    /// Its name without hyphens; empty for a word that belongs to no option.
    pub(super) name: String,
    /// What it was given.
    pub(super) value: Option<String>,
}

/// Options that take no value.
const WITHOUT_VALUE: [&str; 25] = [
    "S",
    "daemonize",
    "enable-kvm",
    "full-screen",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "sdl",
    "singlestep",
    "snapshot",
    "usb",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// Options of the dynamic loader that take a value, when it is what was run.
const LOADER_WITH_VALUE: [&str; 7] = [
    "--argv0",
    "--library-path",
    "--preload",
    "--audit",
    "--inhibit-rpath",
    "--glibc-hwcaps-prepend",
    "--glibc-hwcaps-mask",
];

/// The program and its options. A dynamic loader in front, as `ld.so PROGRAM ARGUMENTS`, is seen
/// through.
pub(super) fn split(words: &[String]) -> (Option<String>, Vec<Opt>) {
    let mut words = words.iter();
    let mut program = words.next().cloned();
    let is_loader = program.as_deref().is_some_and(|p| {
        let base = p.rsplit('/').next().unwrap_or(p);
        base.starts_with("ld-linux") || base.starts_with("ld.so") || base.starts_with("ld-musl")
    });
    if is_loader {
        program = loop {
            match words.next() {
                Some(word) if LOADER_WITH_VALUE.contains(&word.as_str()) => drop(words.next()),
                Some(word) if word.starts_with("--") => {}
                word => break word.cloned(),
            }
        };
    }
    let mut options = Vec::new();
    while let Some(word) = words.next() {
        match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
            Some(name) if !name.is_empty() => {
                let bare = WITHOUT_VALUE.contains(&name);
                let value = if bare { None } else { words.next().cloned() };
                options.push(Opt { name: name.to_owned(), value });
            }
            _ => options.push(Opt { name: String::new(), value: Some(word.clone()) }),
        }
    }
    (program, options)
}

/// The keys and values of one option, in order. Values are taken out; what stays was not looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Props(Vec<(String, String)>);

impl Props {
    /// Reads `key=value,..` or JSON. `implied` is the key of a first value that stands alone.
    ///
    /// # Errors
    ///
    /// What is wrong with it, if it is neither.
    pub(super) fn parse(text: &str, implied: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('{') {
            let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
            let mut flat = Vec::new();
            flatten("", &value, &mut flat, 0)?;
            return Ok(Self(flat));
        }
        let mut all = Vec::new();
        for (i, part) in split_commas(text).into_iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if i == 0 && !implied.is_empty() => (implied.to_owned(), part),
                None => (part, "on".to_owned()),
            };
            all.push((key, value));
        }
        Ok(Self(all))
    }

    /// Takes a value out; the last one, if it is given several times.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let mut last = None;
        self.0.retain(|(k, v)| {
            let hit = k == key;
            if hit {
                last = Some(v.clone());
            }
            !hit
        });
        last
    }

    /// Takes out what is of no interest.
    pub(super) fn drop_all(&mut self, keys: &[&str]) {
        self.0.retain(|(k, _)| !keys.contains(&k.as_str()));
    }

    /// What nobody took, as it was written.
    pub(super) fn rest(self) -> Vec<(String, String)> {
        self.0
    }

    /// Looks without taking.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// Splits at single commas; a doubled one stands for itself.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let part = parts.last_mut();
        match (c, part) {
            (',', _) if chars.peek() != Some(&',') => parts.push(String::new()),
            (',', Some(part)) => {
                chars.next();
                part.push(',');
            }
            (c, Some(part)) => part.push(c),
            (_, None) => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Nested JSON as QEMU writes it in `key=value` form: `file.filename`, `list.0`.
fn flatten(
    prefix: &str,
    value: &Value,
    flat: &mut Vec<(String, String)>,
    depth: usize,
) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err("it is nested too deeply".to_owned());
    }
    let below = |key: &str| {
        if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
    };
    match value {
        Value::Object(map) => {
            map.iter().try_for_each(|(k, v)| flatten(&below(k), v, flat, depth + 1))?;
        }
        Value::Array(list) => {
            for (i, v) in list.iter().enumerate() {
                flatten(&below(&i.to_string()), v, flat, depth + 1)?;
            }
        }
        Value::Bool(on) => flat.push((prefix.to_owned(), if *on { "on" } else { "off" }.into())),
        Value::String(text) => flat.push((prefix.to_owned(), text.clone())),
        Value::Number(number) => flat.push((prefix.to_owned(), number.to_string())),
        Value::Null => {}
    }
    Ok(())
}

/// A switch's value.
pub(super) fn as_switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A number's value: decimal or hex, with a suffix for powers of 1024.
pub(super) fn as_number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let shift = match text.bytes().last()?.to_ascii_lowercase() {
        b'k' => 10,
        b'm' => 20,
        b'g' => 30,
        b't' => 40,
        _ => return text.parse().ok(),
    };
    text[..text.len() - 1].parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(ToOwned::to_owned).collect()
    }

    #[test]
    fn a_loader_in_front_is_seen_through() {
        let line = "/x/ld-linux-x86-64.so.2 --argv0 qemu-system-x86_64 --library-path /a:/b \
                    /usr/bin/qemu-system-x86_64 -S --m 64 disk.img -smp 2";
        let (program, options) = split(&words(line));
        assert_eq!(program.as_deref(), Some("/usr/bin/qemu-system-x86_64"));
        let shown: Vec<_> = options.iter().map(|o| (o.name.as_str(), o.value.as_deref())).collect();
        let wanted = [("S", None), ("m", Some("64")), ("", Some("disk.img")), ("smp", Some("2"))];
        assert_eq!(shown, wanted);
    }

    #[test]
    fn both_forms_say_the_same() {
        let mut plain =
            Props::parse("virtio-blk-pci,id=a,,b,share-rw,drive=d,id=c", "driver").unwrap();
        assert_eq!(plain.take("driver").as_deref(), Some("virtio-blk-pci"));
        assert_eq!(plain.take("id").as_deref(), Some("c"));
        assert_eq!(plain.get("share-rw"), Some("on"));
        let json = r#"{"driver":"x","file":{"a":[true,2]},"n":null}"#;
        let rest = Props::parse(json, "driver").unwrap().rest();
        let wanted = [("driver", "x"), ("file.a.0", "on"), ("file.a.1", "2")];
        assert_eq!(rest, wanted.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(Props::parse("{", "").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_command_line_panics(words in proptest::collection::vec("[-a-z=,.{}\\[\\]\"0-9k\\PC]{0,20}", 0..9)) {
            let (_, options) = split(&words);
            for option in options {
                let text = option.value.unwrap_or_default();
                if let Ok(props) = Props::parse(&text, "x") {
                    for (_, value) in props.rest() {
                        let _ = (as_switch(&value), as_number(&value));
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_have_suffixes() {
        assert_eq!(as_number("4k"), Some(4096));
        assert_eq!(as_number("0x10"), Some(16));
        assert_eq!(as_number("1G"), Some(1 << 30));
        assert_eq!(as_number(""), None);
        assert_eq!(as_number("99999999999999T"), None);
    }
}
