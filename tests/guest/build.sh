#!/bin/sh
# Builds limosa-guest.elf and limosa-guest.bzimage into the directory given. Needs only gcc and binutils.
set -eu
[ $# -eq 1 ] || { echo "usage: sh build.sh OUTDIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
tmp=$(mktemp -d "$out/.guest.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM
cd "$tmp"
${CC:-gcc} -m32 -march=i686 -O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -nostdlib -fno-pic -fno-pie \
    -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none -mno-sse -mno-mmx -mno-80387 \
    -fno-strict-aliasing -fno-tree-loop-distribute-patterns -c "$here"/*.c "$here/start.S"
ld -m elf_i386 -nostdlib -z noexecstack --no-warn-rwx-segments -T "$here/guest.lds" -o guest.elf32 ./*.o
# A 64-bit container around the 32-bit code, since linux-loader and Cloud Hypervisor read no other.
objcopy -I elf32-i386 -O elf64-x86-64 guest.elf32 limosa-guest.elf
objcopy -O binary -j .text guest.elf32 guest.bin
as --32 -I. "$here/setup.S" -o setup.wrap
ld -m elf_i386 -nostdlib -Ttext 0 --oformat binary -e 0 -o limosa-guest.bzimage setup.wrap
# Renamed into place, so that a concurrent reader never sees half a file.
mv limosa-guest.elf limosa-guest.bzimage "$out/"
