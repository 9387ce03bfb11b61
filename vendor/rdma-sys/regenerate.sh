#!/bin/sh
# Makes src/bindings.rs anew: runs the build script of the published rdma-sys 0.3.0 once, with two edits, and keeps what bindgen wrote.
# Needs cargo, curl, libclang 14 (bindgen 0.59 does not work with 16 or newer), libibverbs-dev, librdmacm-dev and pkg-config:
#   apt-get install libclang-14-dev clang-14 libibverbs-dev librdmacm-dev pkg-config
# Then compare (`git diff`) and run `cargo test -p limosa-verbs`, whose layout test asks a C compiler about every struct that is used.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LIBCLANG_PATH="${LIBCLANG_PATH:-/usr/lib/llvm-14/lib}"
cd "$work"
curl -fsSL https://static.crates.io/crates/rdma-sys/rdma-sys-0.3.0.crate -o rdma-sys.crate
echo "eb99f15922d2e1ed51ba14279fc72f6b9ae8356285588173bddfd7781224f9a7  rdma-sys.crate" | sha256sum -c -
tar xzf rdma-sys.crate
cd rdma-sys-0.3.0
# An event number that these headers do not know must not be undefined behaviour in an enum of Rust.
sed -i 's/\.rustified_enum("ibv_event_type")/.constified_enum_module("ibv_event_type")/' build.rs
sed -i 's/use crate::\*;/use crate::*;\nuse crate::ibv_event_type::Type as ibv_event_number;/; s/pub event_type: ibv_event_type,/pub event_type: ibv_event_number,/' src/types.rs
# What the layout tests of bindgen say about one machine's headers is asked of the headers themselves, by limosa-verbs.
sed -i 's/\.generate_comments(false)/.generate_comments(false).layout_tests(false)/' build.rs
CARGO_TARGET_DIR="$work/target" cargo build
cp "$work"/target/debug/build/rdma-sys-*/out/bindings.rs "$here/src/bindings.rs"
wc -l "$here/src/bindings.rs"
