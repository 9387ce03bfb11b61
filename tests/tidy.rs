//! The rules of the house that a machine can hold: sizes, where `unsafe` may be, arrows between crates, names, and that
//! what the documents claim exists. It judges text and syntax, not behaviour.
//!
//! Each rule is a function from what it looks at to a list of complaints, so that each can be tested with a planted
//! fault. A complaint says where, what, and what to do. The lists below are ratchets: an exception that is no longer
//! needed, or could be smaller, is a complaint too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 500;
const FILE_LINES_HARD_MAX: usize = 700;
const SOURCE_DEPTH_MAX: usize = 2;

/// Files over `FILE_LINES_MAX`, with the lines of code they have. Never over `FILE_LINES_HARD_MAX`.
const LONG_FILES: &[(&str, usize)] = &[];
/// Functions over `FUNCTION_LINES_MAX` as (file, function, lines).
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[];

/// Where `unsafe` may be: a file, or all files under a folder (ending in `/`).
const UNSAFE_ALLOWED: &[&str] = &[
    "transport/announce/src/socket.rs",
    "transport/verbs/src/",
    "vmm/machine/src/dirty/",
    "vmm/machine/src/kvm.rs",
    "vmm/machine/src/memory.rs",
    "vmm/machine/src/tap.rs",
    "vmm/machine/src/vcpu.rs",
    "vmm/plug/src/mapping.rs",
    "vmm/plug/src/memory.rs",
    "vmm/plug/src/socket.rs",
];
/// Crates of which a file is in that list; all others say `#![forbid(unsafe_code)]`, these `#![deny(unsafe_code)]` or nothing.
const UNSAFE_CRATES: &[&str] = &["transport/announce", "transport/verbs", "vmm/machine", "vmm/plug"];

/// The arrows: which of our crates a crate may name in `[dependencies]`.
const ARROWS: &[(&str, &[&str])] = &[
    ("limosa-proto", &[]),
    ("limosa-verbs", &[]),
    ("limosa-announce", &[]),
    ("limosa-machine", &[]),
    ("limosa-link", &["limosa-proto", "limosa-verbs"]),
    ("limosa-plug", &["limosa-proto"]),
    ("limosa-agent", &["limosa-link", "limosa-proto", "limosa-plug", "limosa-announce"]),
    ("limosa", &["limosa-agent", "limosa-machine", "limosa-plug", "limosa-proto"]),
    ("rig", &["limosa-proto"]),
];

#[test]
fn functions_are_short() {
    let complaints = sources().iter().flat_map(|source| long_functions(source, LONG_FUNCTIONS)).collect();
    assert_tidy(complaints);
}

#[test]
fn files_are_short() {
    let all = sources();
    let mut complaints: Vec<String> = all.iter().filter_map(|source| long_file(source, LONG_FILES)).collect();
    let known: BTreeSet<&str> = all.iter().map(|source| source.path.as_str()).collect();
    let gone = LONG_FILES.iter().filter(|(path, _)| !known.contains(path));
    complaints.extend(gone.map(|(path, _)| format!("LONG_FILES names {path}, which is not there: take it out")));
    assert_tidy(complaints);
}

#[test]
fn unsafe_is_only_where_it_may_be() {
    let mut complaints = Vec::new();
    for source in sources() {
        complaints.extend(misplaced_unsafe(&source));
        complaints.extend(unforbidden_unsafe(&source));
    }
    assert_tidy(complaints);
}

#[test]
fn every_file_says_what_it_is() {
    assert_tidy(sources().iter().filter_map(no_opening).collect());
}

#[test]
fn names_are_those_of_the_field() {
    assert_tidy(sources().iter().flat_map(foreign_names).collect());
}

#[test]
fn sources_are_not_deep() {
    assert_tidy(sources().iter().filter_map(too_deep).collect());
}

#[test]
fn crates_keep_to_the_arrows() {
    assert_tidy(manifests().iter().flat_map(forbidden_arrows).collect());
}

#[test]
fn crates_share_the_lints() {
    let all = manifests();
    let without = all.iter().filter(|m| m.toml.get("lints").and_then(|l| l.get("workspace")?.as_bool()) != Some(true));
    assert_tidy(without.map(|m| format!("{}: write `[lints]` `workspace = true`", m.path)).collect());
}

#[test]
fn every_dependency_has_a_reason() {
    let all = manifests();
    let mut complaints = unexplained_dependencies(&all, &read("docs/ARCHITECTURE.md"));
    complaints.extend(unused_dependencies(&all));
    assert_tidy(complaints);
}

#[test]
fn every_invariant_names_its_test() {
    let sources = sources();
    let functions = function_names(sources.iter().map(|source| source.text.as_str()));
    let tests = test_names(sources.iter().map(|source| source.text.as_str()));
    assert_tidy(unheld_invariants(&read("docs/ARCHITECTURE.md"), &functions, &tests));
}

/// One Rust file: its path from the root of the repository with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn syntax(&self) -> syn::File {
        syn::parse_file(&self.text).unwrap_or_else(|error| panic!("{}: {error}", self.path))
    }

    /// A file of tests, or of what tests stand on.
    fn is_test(&self) -> bool {
        self.path.contains("/tests/") || (self.path.starts_with("tests/") && !self.path.starts_with("tests/rig/"))
    }
}

/// One `Cargo.toml` of the workspace.
struct Manifest {
    path: String,
    toml: toml::Table,
}

impl Manifest {
    fn package(&self) -> &str {
        self.toml.get("package").and_then(|p| p.get("name")?.as_str()).unwrap_or_default()
    }

    fn dependencies(&self, table: &str) -> Vec<&str> {
        let table = self.toml.get(table).and_then(|table| table.as_table());
        table.into_iter().flat_map(|table| table.keys()).map(String::as_str).collect()
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["transport", "vmm", "tests", "benches"] {
        walk(&root().join(folder), "rs", &mut paths);
    }
    assert!(paths.len() > 20, "only {} Rust files found: the walk is broken", paths.len());
    paths.into_iter().map(|path| Source { text: read(&path), path }).collect()
}

fn manifests() -> Vec<Manifest> {
    let mut paths = vec!["Cargo.toml".to_owned()];
    for folder in ["transport", "vmm"] {
        let mut found = Vec::new();
        walk(&root().join(folder), "toml", &mut found);
        paths.extend(found.into_iter().filter(|path| path.ends_with("/Cargo.toml")));
    }
    paths.into_iter().map(|path| Manifest { toml: read(&path).parse().unwrap(), path }).collect()
}

fn walk(folder: &Path, extension: &str, found: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut entries: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            walk(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path.strip_prefix(root()).unwrap().to_string_lossy().into_owned());
        }
    }
}

fn assert_tidy(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{} complaints:\n  {}\n", complaints.len(), complaints.join("\n  "));
}

// Sizes.

/// Collects each function with a body: its name, first line, lines from `fn` to the closing brace.
#[derive(Default)]
struct Functions(Vec<(String, usize, usize)>);

impl Functions {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let (first, last) = (signature.span().start().line, block.span().end().line);
        self.0.push((signature.ident.to_string(), first, last - first + 1));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.add(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

fn long_functions(source: &Source, exceptions: &[(&str, &str, usize)]) -> Vec<String> {
    let mut functions = Functions::default();
    functions.visit_file(&source.syntax());
    let mut complaints = Vec::new();
    for (name, line, lines) in &functions.0 {
        let at = format!("{}:{line}: fn {name} has {lines} lines", source.path);
        let exception = exceptions.iter().find(|(path, function, _)| *path == source.path && function == name);
        match exception {
            None if *lines > FUNCTION_LINES_MAX => complaints.push(format!("{at}, at most {FUNCTION_LINES_MAX}: cut it")),
            Some((_, _, allowed)) if lines != allowed => {
                complaints.push(format!("{at}, but LONG_FUNCTIONS says {allowed}: cut it, or lower the exception"));
            }
            _ => {}
        }
    }
    let here = exceptions.iter().filter(|(path, _, _)| *path == source.path);
    let stale = here.filter(|(_, name, allowed)| {
        *allowed <= FUNCTION_LINES_MAX || !functions.0.iter().any(|(function, _, _)| function == name)
    });
    complaints.extend(stale.map(|(path, name, _)| format!("LONG_FUNCTIONS names {path} {name} for nothing: take it out")));
    complaints
}

/// Lines that are neither blank nor comment, those of `#[cfg(test)]` items apart.
fn code_lines(source: &Source) -> usize {
    let mut apart = BTreeSet::new();
    for item in &source.syntax().items {
        if let syn::Item::Mod(module) = item
            && module.attrs.iter().any(is_cfg_test)
        {
            apart.extend(module.span().start().line..=module.span().end().line);
        }
    }
    let lines = source.text.lines().enumerate().filter(|(index, _)| !apart.contains(&(index + 1)));
    lines.map(|(_, line)| line.trim()).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

fn is_cfg_test(attribute: &syn::Attribute) -> bool {
    attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
}

fn long_file(source: &Source, exceptions: &[(&str, usize)]) -> Option<String> {
    let lines = code_lines(source);
    let at = format!("{} has {lines} lines of code", source.path);
    let soft = if source.is_test() { FILE_LINES_HARD_MAX } else { FILE_LINES_MAX };
    if lines > FILE_LINES_HARD_MAX {
        return Some(format!("{at}, never more than {FILE_LINES_HARD_MAX}: a noun is missing, cut the file"));
    }
    match exceptions.iter().find(|(path, _)| *path == source.path) {
        Some((_, allowed)) if lines <= soft || lines > *allowed || lines + 20 < *allowed => {
            Some(format!("{at}, but LONG_FILES says {allowed}: cut it, or lower the exception"))
        }
        None if lines > soft => Some(format!("{at}, at most {soft}: a noun is missing, cut the file")),
        _ => None,
    }
}

// Unsafe.

/// Collects the lines on which something is unsafe.
#[derive(Default)]
struct Unsafe(Vec<usize>);

impl<'ast> Visit<'ast> for Unsafe {
    fn visit_expr_unsafe(&mut self, item: &'ast syn::ExprUnsafe) {
        self.0.push(item.span().start().line);
        visit::visit_expr_unsafe(self, item);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.0.extend(signature.unsafety.as_ref().map(|token| token.span().start().line));
        visit::visit_signature(self, signature);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.0.extend(item.unsafety.as_ref().map(|token| token.span().start().line));
        visit::visit_item_impl(self, item);
    }

    fn visit_item_foreign_mod(&mut self, item: &'ast syn::ItemForeignMod) {
        self.0.push(item.span().start().line);
        visit::visit_item_foreign_mod(self, item);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        // The inside of a macro is tokens only: look for the word.
        collect_unsafe(item.tokens.clone(), &mut self.0);
    }
}

fn collect_unsafe(tokens: proc_macro2::TokenStream, lines: &mut Vec<usize>) {
    for token in tokens {
        match token {
            proc_macro2::TokenTree::Group(group) => collect_unsafe(group.stream(), lines),
            proc_macro2::TokenTree::Ident(word) if word == "unsafe" => lines.push(word.span().start().line),
            _ => {}
        }
    }
}

fn misplaced_unsafe(source: &Source) -> Vec<String> {
    let allowed = |place: &str| source.path == place || (place.ends_with('/') && source.path.starts_with(place));
    // Tests of a crate with unsafe may stand on the same footing as the crate.
    let own_tests = |krate: &str| source.path.starts_with(&format!("{krate}/tests/"));
    if UNSAFE_ALLOWED.iter().any(|place| allowed(place)) || UNSAFE_CRATES.iter().any(|krate| own_tests(krate)) {
        return Vec::new();
    }
    let mut found = Unsafe::default();
    found.visit_file(&source.syntax());
    let complaint = |line: &usize| format!("{}:{line}: unsafe outside the files of UNSAFE_ALLOWED in tests/tidy.rs", source.path);
    found.0.iter().map(complaint).collect()
}

fn unforbidden_unsafe(source: &Source) -> Option<String> {
    let is_root =
        source.path.ends_with("/src/lib.rs") || source.path.ends_with("/src/main.rs") || source.path == "tests/rig/lib.rs";
    let exempt = UNSAFE_CRATES.iter().any(|krate| source.path.starts_with(&format!("{krate}/")));
    let forbidden = source.text.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]");
    (is_root && !exempt && !forbidden).then(|| format!("{}: write #![forbid(unsafe_code)]", source.path))
}

// Openings, depth, names.

fn no_opening(source: &Source) -> Option<String> {
    let first = source.text.lines().next().unwrap_or_default();
    let says = first.strip_prefix("//!").is_some_and(|words| words.trim().len() >= 10);
    (!says).then(|| format!("{}:1: open with `//!` and what the file is and what it is not", source.path))
}

fn too_deep(source: &Source) -> Option<String> {
    let (_, inside) = source.path.split_once("/src/")?;
    let depth = inside.split('/').count();
    (depth > SOURCE_DEPTH_MAX).then(|| format!("{}: {depth} deep under src, at most {SOURCE_DEPTH_MAX}", source.path))
}

/// Collects the names that a file declares (uses of other people's names are theirs).
#[derive(Default)]
struct Declared {
    values: Vec<(String, usize)>,
    types: Vec<(String, usize)>,
}

impl Declared {
    fn value(&mut self, ident: &syn::Ident) {
        self.values.push((ident.to_string(), ident.span().start().line));
    }

    fn kind(&mut self, ident: &syn::Ident) {
        self.types.push((ident.to_string(), ident.span().start().line));
    }
}

impl<'ast> Visit<'ast> for Declared {
    fn visit_field_pat(&mut self, pat: &'ast syn::FieldPat) {
        // `Theirs { src_addr, .. }` repeats their name; `Theirs { src_addr: mine, .. }` declares ours.
        if pat.colon_token.is_some() {
            visit::visit_field_pat(self, pat);
        }
    }

    fn visit_pat_ident(&mut self, pat: &'ast syn::PatIdent) {
        self.value(&pat.ident);
        visit::visit_pat_ident(self, pat);
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        field.ident.iter().for_each(|ident| self.value(ident));
        visit::visit_field(self, field);
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.value(&item.sig.ident);
        visit::visit_item_fn(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        // The names of a trait's functions are the trait's.
        if item.trait_.is_none() {
            for inner in &item.items {
                if let syn::ImplItem::Fn(function) = inner {
                    self.value(&function.sig.ident);
                }
            }
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.kind(&item.ident);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.kind(&item.ident);
        item.variants.iter().for_each(|variant| self.kind(&variant.ident));
        visit::visit_item_enum(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.kind(&item.ident);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.kind(&item.ident);
        visit::visit_item_type(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.value(&item.ident);
        visit::visit_item_mod(self, item);
    }
}

fn foreign_names(source: &Source) -> Vec<String> {
    let mut declared = Declared::default();
    declared.visit_file(&source.syntax());
    let bad_value = |name: &str| name.split('_').any(|part| matches!(part, "src" | "dst"));
    let bad_type = |name: &str| ["Client", "Server", "Src", "Dst"].iter().any(|word| has_word(name, word));
    let values = declared.values.iter().filter(|(name, _)| bad_value(name));
    let types = declared.types.iter().filter(|(name, _)| bad_type(name));
    let complaint = |(name, line): &(String, usize)| {
        format!("{}:{line}: {name}: say source or destination, or what it is (never client, server)", source.path)
    };
    values.chain(types).map(complaint).collect()
}

/// `TlsServer` and `ServerSide` have the word `Server`, `Observer` and `Servers` have not.
fn has_word(name: &str, word: &str) -> bool {
    name.match_indices(word).any(|(at, _)| !name[at + word.len()..].starts_with(char::is_lowercase))
}

// Manifests and documents.

fn forbidden_arrows(manifest: &Manifest) -> Vec<String> {
    let package = manifest.package();
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package) else {
        return vec![format!("{}: the crate {package:?} is not in ARROWS of tests/tidy.rs", manifest.path)];
    };
    let ours = |name: &&str| ARROWS.iter().any(|(package, _)| package == name);
    let named = manifest.dependencies("dependencies").into_iter().chain(manifest.dependencies("build-dependencies"));
    let bad = named.filter(ours).filter(|name| !allowed.contains(name));
    bad.map(|name| format!("{}: {package} -> {name} is no allowed arrow (design, section 3)", manifest.path)).collect()
}

const TABLES: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

fn unexplained_dependencies(manifests: &[Manifest], architecture: &str) -> Vec<String> {
    let mut users: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for manifest in manifests {
        for name in TABLES.iter().flat_map(|table| manifest.dependencies(table)) {
            users.entry(name).or_default().push(&manifest.path);
        }
    }
    let ours = |name: &str| ARROWS.iter().any(|(package, _)| *package == name);
    let bad = users.iter().filter(|(name, _)| !ours(name) && !architecture.contains(&format!("`{name}`")));
    let complaint = |(name, paths): (&&str, &Vec<&str>)| {
        format!("{}: `{name}` has no line in docs/ARCHITECTURE.md: write what it is for, or do without it", paths.join(", "))
    };
    bad.map(complaint).collect()
}

fn unused_dependencies(manifests: &[Manifest]) -> Vec<String> {
    let used: BTreeSet<&str> =
        manifests.iter().flat_map(|manifest| TABLES.iter().flat_map(|table| manifest.dependencies(table))).collect();
    let offered = manifests.iter().filter_map(|m| m.toml.get("workspace")?.get("dependencies")?.as_table());
    let unused = offered.flat_map(|table| table.keys()).filter(|name| !used.contains(name.as_str()));
    // `rig` stands there for dev-dependencies of crates, whether or not one has it today.
    let complaint = |name: &String| format!("Cargo.toml: no crate uses {name}: take it out of [workspace.dependencies]");
    unused.filter(|name| *name != "rig").map(complaint).collect()
}

/// Each paragraph, list item or table row that begins with I and a number must name, in backticks, a test that exists; and
/// whatever looks like a function in it (two underscores or more) must exist.
fn unheld_invariants(document: &str, functions: &BTreeSet<String>, tests: &BTreeSet<String>) -> Vec<String> {
    let invariants = invariants(document);
    if invariants.is_empty() {
        return vec!["docs/ARCHITECTURE.md: no invariant found: each begins a line with I and its number".to_owned()];
    }
    let mut complaints = Vec::new();
    let mut seen = BTreeSet::new();
    for (id, text) in &invariants {
        let named: Vec<&str> = text.split('`').skip(1).step_by(2).map(|word| word.rsplit("::").next().unwrap_or(word)).collect();
        let is_name = |word: &str| word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if !seen.insert(id) {
            complaints.push(format!("docs/ARCHITECTURE.md: {id} is there twice"));
        }
        if !named.iter().any(|word| tests.contains(*word)) {
            complaints.push(format!("docs/ARCHITECTURE.md: {id} names no existing test: write the test's name in backticks"));
        }
        let gone = named.iter().filter(|word| is_name(word) && word.matches('_').count() >= 2 && !functions.contains(**word));
        complaints.extend(gone.map(|word| format!("docs/ARCHITECTURE.md: {id} names `{word}`, which does not exist")));
    }
    complaints
}

fn invariants(document: &str) -> Vec<(String, String)> {
    let mut list: Vec<(String, String)> = Vec::new();
    let mut open = false;
    for line in document.lines() {
        let start = line.trim_start_matches(|c: char| c.is_whitespace() || "|-*".contains(c));
        let digits: String = start.strip_prefix('I').unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
        if !digits.is_empty() {
            list.push((format!("I{digits}"), line.to_owned()));
            open = true;
        } else if line.trim().is_empty() || line.starts_with('#') {
            open = false;
        } else if open && let Some((_, text)) = list.last_mut() {
            text.push('\n');
            text.push_str(line);
        }
    }
    list
}

/// Names after `fn`, in macros like `proptest!` too.
fn function_names<'a>(texts: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let lines = texts.flat_map(str::lines).filter(|line| !line.trim_start().starts_with("//"));
    lines.filter_map(function_name).collect()
}

fn test_names<'a>(texts: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for text in texts {
        let (mut marked, mut listed) = (false, false);
        for line in text.lines().map(str::trim) {
            // The checks of a suite that a macro makes a test of, for each link one.
            listed = (listed || line.starts_with("conformance! {")) && line != "}";
            if listed {
                names.extend(line.split([',', ';', ':', ' ']).filter(|word| !word.is_empty()).map(str::to_owned));
            }
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                marked = true;
            }
            if marked && let Some(name) = function_name(line) {
                names.insert(name);
                marked = false;
            }
        }
    }
    names
}

fn function_name(line: &str) -> Option<String> {
    let words = line.trim().trim_start_matches("pub ").trim_start_matches("pub(crate) ").trim_start_matches("async ");
    let words = words.trim_start_matches("#[test] ").strip_prefix("fn ")?;
    let name: String = words.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

/// The rules themselves, each with a planted fault.
mod rules {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    fn manifest(text: &str) -> Manifest {
        Manifest { path: "x/Cargo.toml".to_owned(), toml: text.parse().unwrap() }
    }

    #[test]
    fn a_long_function_is_found_and_its_exception_is_a_ratchet() {
        let body = |lines: usize| source("a/src/x.rs", &format!("fn f() {{\n{}}}\n", "g();\n".repeat(lines - 2)));
        assert_eq!(long_functions(&body(70), &[]), Vec::<String>::new());
        assert_eq!(long_functions(&body(71), &[]).len(), 1);
        assert_eq!(long_functions(&body(71), &[("a/src/x.rs", "f", 71)]), Vec::<String>::new());
        assert_eq!(long_functions(&body(71), &[("a/src/x.rs", "f", 80)]).len(), 1, "the exception is too wide");
        assert_eq!(long_functions(&body(10), &[("a/src/x.rs", "g", 71)]).len(), 1, "the exception is stale");
        let method = source("a/src/x.rs", &format!("impl A {{ fn f() {{\n{}}} }}", "g();\n".repeat(80)));
        assert_eq!(long_functions(&method, &[]).len(), 1);
    }

    #[test]
    fn a_long_file_is_found_and_tests_do_not_count() {
        let code = |lines: usize| "const A: u8 = 1;\n\n// why\n".repeat(lines);
        let file = |lines: usize| source("a/src/x.rs", &code(lines));
        assert_eq!(long_file(&file(500), &[]), None);
        assert!(long_file(&file(501), &[]).is_some());
        assert_eq!(long_file(&file(501), &[("a/src/x.rs", 510)]), None);
        assert!(long_file(&file(501), &[("a/src/x.rs", 600)]).is_some(), "the exception is too wide");
        assert!(long_file(&file(701), &[("a/src/x.rs", 701)]).is_some(), "no exception from the hard limit");
        let tests = source("a/src/x.rs", &format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", code(500), code(400)));
        assert_eq!(long_file(&tests, &[]), None);
    }

    #[test]
    fn misplaced_unsafe_of_every_kind_is_found() {
        for text in [
            "fn f() { unsafe { g() } }",
            "unsafe fn f() {}",
            "unsafe impl Send for A {}",
            "extern \"C\" { fn f(); }",
            "fn f() { vec![unsafe { g() }]; }",
            "macro_rules! m { () => { unsafe { g() } } }",
        ] {
            assert_eq!(misplaced_unsafe(&source("vmm/agent/src/x.rs", text)).len(), 1, "{text}");
            assert_eq!(misplaced_unsafe(&source("vmm/machine/src/kvm.rs", text)), Vec::<String>::new());
        }
        assert_eq!(misplaced_unsafe(&source("vmm/agent/src/x.rs", "// unsafe\nfn f() { \"unsafe\"; }")), Vec::<String>::new());
        assert!(unforbidden_unsafe(&source("vmm/agent/src/lib.rs", "//! A.")).is_some());
        assert!(unforbidden_unsafe(&source("vmm/agent/src/lib.rs", "#![forbid(unsafe_code)]")).is_none());
    }

    #[test]
    fn openings_depth_and_names_are_judged() {
        assert!(no_opening(&source("a.rs", "use std::fs;")).is_some());
        assert!(no_opening(&source("a.rs", "//!")).is_some());
        assert!(no_opening(&source("a.rs", "//! The queue of a device.")).is_none());
        assert!(too_deep(&source("vmm/a/src/b/c/d.rs", "")).is_some());
        assert!(too_deep(&source("vmm/a/src/b/c.rs", "")).is_none());
        for bad in ["fn f(src: u8) {}", "struct A { dst_port: u8 }", "struct TlsClient;", "enum A { Server }", "fn copy_src() {}"]
        {
            assert_eq!(foreign_names(&source("a.rs", bad)).len(), 1, "{bad}");
        }
        let theirs = "fn f(source: u8) { let X { src_addr, .. } = y; g(rustls::ClientConfig { dst_addr: 1 }); } struct Observer;";
        assert_eq!(foreign_names(&source("a.rs", theirs)), Vec::<String>::new());
    }

    #[test]
    fn arrows_and_dependencies_are_judged() {
        let proto = manifest("[package]\nname = 'limosa-proto'\n[dependencies]\nlimosa-link.workspace = true\nserde = '1'");
        assert_eq!(forbidden_arrows(&proto).len(), 1);
        let link = manifest("[package]\nname = 'limosa-link'\n[dependencies]\nlimosa-proto.workspace = true");
        assert_eq!(forbidden_arrows(&link), Vec::<String>::new());
        assert_eq!(forbidden_arrows(&manifest("[package]\nname = 'new'")).len(), 1);
        let all = [proto, link, manifest("[workspace.dependencies]\nserde = '1'\nleft-over = '1'")];
        assert_eq!(unexplained_dependencies(&all, "").len(), 1);
        assert_eq!(unexplained_dependencies(&all, "`serde`: the journal"), Vec::<String>::new());
        assert_eq!(unused_dependencies(&all).len(), 1);
    }

    #[test]
    fn invariants_need_tests_that_exist() {
        let text = "#[test]\nfn one_holds_it() {}\n fn not_a_test() {}\nproptest! {\n #[test]\n fn always_true(x in 0..1) {} }\n\
                    conformance! { $name: $subject;\n moving: a_check, another;\n}\nfn a_check() {}";
        let (functions, tests) = (function_names([text].into_iter()), test_names([text].into_iter()));
        let judge = |document: &str| unheld_invariants(document, &functions, &tests).len();
        assert_eq!(judge("- **I1** True.\n  Held by `one_holds_it`.\n\n| I2 | too | `a::always_true` |"), 0);
        assert_eq!(judge("- **I1** True: `a_check`."), 0);
        assert_eq!(judge("- **I1** True."), 1);
        assert_eq!(judge("- **I1** True: `not_a_test`."), 1);
        assert_eq!(judge("- **I1** True: `one_holds_it`, `one_that_is_gone`."), 1);
        assert_eq!(judge("- **I1** `one_holds_it`\n- **I1** `one_holds_it`"), 1);
        assert_eq!(judge("Nothing."), 1);
    }
}
