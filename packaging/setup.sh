#!/bin/sh
# Installs the system packages that Limosa needs and that are missing, and says which. For Debian 12 and Ubuntu 24.04.
# Without root it says what is missing and ends with 1. If nothing is missing it says and does nothing.
#
#   setup.sh build   to compile                        setup.sh demo   and to run `limosa demo`
#   setup.sh lab     to run the soft-RoCE lab          setup.sh all    all of it: to test and benchmark
set -eu

RUST_MIN=1.95
PATH="$PATH:/usr/sbin:/sbin"
purpose=${1:-all}

# "command package" pairs: a package is missing if its command is.
build='cc:gcc as:binutils ld:binutils make:make'
demo="$build ip:iproute2 bridge:iproute2"
lab="$build ip:iproute2 qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio modprobe:kmod
    ibv_devinfo:ibverbs-utils ib_write_bw:perftest ping:iputils-ping iperf3:iperf3 xz:xz-utils
    mkfs.ext4:e2fsprogs qemu-img:qemu-utils"
all="$demo $lab qemu-img:qemu-utils qemu-io:qemu-utils"
case $purpose in
    build) wanted=$build ;;
    demo) wanted=$demo ;;
    lab) wanted=$lab ;;
    all) wanted=$all ;;
    *) echo "setup: what is '$purpose'? One of build, demo, lab, all" >&2; exit 2 ;;
esac

add() {
    case " $missing " in *" $1 "*) ;; *) missing="${missing:+$missing }$1" ;; esac
}

# What is missing now.
look() {
    missing=
    # Where a command was found before does not count: its package may be gone.
    hash -r
    for pair in $wanted; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || add "${pair#*:}"
    done
    # The linker needs the C library's start files, which gcc only recommends.
    if ! [ -e "/usr/include/stdio.h" ]; then add libc6-dev; fi
    # Soft-RoCE's half of libibverbs is a plug-in that only this package has; RDMA's headers are for the test that compares
    # structures with C's.
    case $purpose in
        lab | all) ls /usr/lib/*/libibverbs/librxe-rdmav*.so >/dev/null 2>&1 || add ibverbs-providers ;;
    esac
    if [ "$purpose" = all ]; then
        [ -e /usr/include/infiniband/verbs.h ] || add libibverbs-dev
        [ -e /usr/include/rdma/rdma_cma.h ] || add librdmacm-dev
    fi
}

# Twice, for apt may remove one of them to install another: a qemu-utils from backports beside Debian's own qemu-system-x86.
look
for _ in 1 2; do
    [ -n "$missing" ] || break
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: missing: $missing (Debian's names; there is no apt-get here: install them by your system's means)" >&2
        exit 1
    fi
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: missing: $missing" >&2
        echo "setup: run this as root, or: sudo apt-get install --no-install-recommends $missing" >&2
        exit 1
    fi
    echo "setup: installing $missing"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    export DEBIAN_FRONTEND=noninteractive
    # $missing is a list of words.
    # shellcheck disable=SC2086
    if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
        echo "setup: apt-get failed:" >&2
        tail -n 20 "$log" >&2
        exit 1
    fi
    rm -f "$log"
    look
done
if [ -n "$missing" ]; then
    echo "setup: apt-get has installed all that was missing, and still these are not there: $missing" >&2
    exit 1
fi

say_how() {
    echo "setup: $1" >&2
    echo "setup: install it by rustup (https://rustup.rs; on Ubuntu 24.04 also 'apt-get install rustup'):" >&2
    echo "setup:     rustup toolchain install stable --profile minimal -c clippy -c rustfmt && rustup default stable" >&2
    exit 1
}
command -v cargo >/dev/null 2>&1 || say_how "Rust $RUST_MIN or newer is missing"
have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2)
[ -n "$have" ] || say_how "cargo is there but does not run"
oldest=$(printf '%s\n%s\n' "$RUST_MIN" "$have" | sort -V | head -n 1)
[ "$oldest" = "$RUST_MIN" ] || say_how "Rust $have is too old: $RUST_MIN or newer is needed"
if [ "$purpose" = all ]; then
    for part in clippy fmt; do
        cargo $part --version >/dev/null 2>&1 || say_how "cargo $part is missing"
    done
fi
