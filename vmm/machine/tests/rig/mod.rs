//! What the machine's tests stand on: guests assembled on the spot, machines of them, memory copied between them.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use limosa_machine::{BootConfig, Machine, MachineConfig, MemoryConfig};

pub const COUNTER: u64 = 0x20_0000;
pub const TICKS: u64 = 0x20_0010;
pub const BAD: u64 = 0x20_0020;

/// A guest that counts in a register and in memory, compares both, dirties pages in turn, lets the timer interrupt it and
/// reads back a register of the serial port each time round. Where KVM has only its emulator, IRET of protected mode is
/// missing, so the handler returns by POPF and RET.
pub const CLOCKWORK: &str = r#"
    .code32
    mov $0x9000, %esp
    mov $tick, %eax
    mov $idt + 0x20 * 8, %edi
    mov %ax, (%edi)
    movw $0x10, 2(%edi)
    movw $0x8e00, 4(%edi)
    shr $16, %eax
    mov %ax, 6(%edi)
    lidt idtr
    mov $0x11, %al
    out %al, $0x20
    out %al, $0xa0
    mov $0x20, %al
    out %al, $0x21
    mov $0x28, %al
    out %al, $0xa1
    mov $4, %al
    out %al, $0x21
    mov $2, %al
    out %al, $0xa1
    mov $1, %al
    out %al, $0x21
    out %al, $0xa1
    mov $0xfe, %al
    out %al, $0x21
    mov $0xff, %al
    out %al, $0xa1
    mov $0x34, %al
    out %al, $0x43
    mov $0x9c, %al
    out %al, $0x40
    mov $0x2e, %al
    out %al, $0x40
    mov $0x3ff, %dx
    mov $0x5a, %al
    out %al, %dx
    mov $0x3f8, %dx
    mov $'R', %al
    out %al, %dx
    xor %esi, %esi
    mov $0x200000, %edi
    sti
again:
    inc %esi
    incl (%edi)
    cmp %esi, (%edi)
    jne bad
    mov %esi, %eax
    and $0x3ff, %eax
    shl $12, %eax
    mov %esi, 0x400000(%eax)
    mov $0x3ff, %dx
    in %dx, %al
    cmp $0x5a, %al
    je again
bad:
    movl $0xbad, 0x200020
    mov $0x3f8, %dx
    mov $'E', %al
    out %al, %dx
    cli
stop: hlt
    jmp stop
tick:
    incl 0x200010
    push %eax
    mov $0x20, %al
    out %al, $0x20
    mov 4(%esp), %eax
    xchg 12(%esp), %eax
    mov %eax, 8(%esp)
    pop %eax
    add $4, %esp
    popf
    ret
idtr: .word 0x28 * 8 - 1
    .long idt
    .align 8
idt: .skip 0x28 * 8
"#;

/// A guest whose vCPUs all count, each in a cache line of its own from 0x200000 on.
pub const SMP: &str = r#"
    .code32
    cld
    mov $trampoline, %esi
    mov $0x8000, %edi
    mov $trampoline_end - trampoline, %ecx
    rep movsb
    movl $0x1ff, 0xfee000f0
    movl $0xc4500, 0xfee00300
    mov $2000, %ecx
wait: pause
    loop wait
    movl $0xc4608, 0xfee00300
    mov $2000, %ecx
wait2: pause
    loop wait2
    movl $0xc4608, 0xfee00300
count:
    mov $1, %eax
    lock xadd %eax, next
    shl $6, %eax
    add $0x200000, %eax
again: incl (%eax)
    jmp again
next: .long 0
    .code16
trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl 0x8000 + gdtr - trampoline
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $0x10, $protected
gdtr: .word 31
    .long 0x500
trampoline_end:
    .code32
protected:
    mov $0x18, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    jmp count
"#;

/// A guest that does nothing.
pub const IDLE: &str = ".code32\nagain: hlt\njmp again\n";

pub fn has_kvm() -> bool {
    let present = Path::new("/dev/kvm").exists();
    if !present {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "KVM is demanded");
        println!("skipped: no /dev/kvm");
    }
    present
}

fn run(program: &str, args: &[&str], dir: &Path) {
    let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Assembles a program and wraps it into a PVH ELF, entered at its first byte, 1 MiB.
pub fn assemble(source: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("guest.s"), source).unwrap();
    run("as", &["--32", "-o", "guest.o", "guest.s"], dir.path());
    let link = ["-m", "elf_i386", "-Ttext=0x100000", "-e", "0x100000", "--oformat", "binary", "-o", "guest.bin", "guest.o"];
    run("ld", &link, dir.path());
    let code = std::fs::read(dir.path().join("guest.bin")).unwrap();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [0x10_0000_u64, 64, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    for (kind, offset, address, bytes) in [(1_u32, 0x200_u64, 0x10_0000_u64, code.len() as u64), (4, 0x100, 0, 20)] {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for value in [offset, address, address, bytes, bytes, 4] {
            image.extend(value.to_le_bytes());
        }
    }
    image.resize(0x100, 0);
    for word in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        image.extend(word.to_le_bytes());
    }
    image.resize(0x200, 0);
    image.extend(code);
    let path = dir.path().join("guest.elf");
    std::fs::write(&path, image).unwrap();
    (dir, path)
}

pub fn config(vcpus: u32, mib: u64) -> MachineConfig {
    MachineConfig::new(vcpus, MemoryConfig::new(mib << 20))
}

/// A machine that has booted `source`, not yet running.
pub fn booted(source: &str, config: MachineConfig) -> Machine {
    let (_dir, kernel) = assemble(source);
    let machine = Machine::new(config).unwrap();
    machine.boot(&BootConfig { kernel, initramfs: None, cmdline: "test=1".to_owned() }).unwrap();
    machine
}

pub fn word(machine: &Machine, gpa: u64) -> u32 {
    let mut bytes = [0; 4];
    machine.read_memory(gpa, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// Waits until `done`, or fails after 20 s.
pub fn wait_until(machine: &Machine, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}; events: {:?}", machine.events().try_recv());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// All of a machine's memory, region after region.
pub fn memory(machine: &Machine) -> Vec<Vec<u8>> {
    let regions = machine.regions();
    let copies = regions.iter().map(|region| {
        let mut bytes = vec![0; region.bytes as usize];
        machine.read_memory(region.gpa, &mut bytes).unwrap();
        bytes
    });
    copies.collect()
}

pub fn fill(machine: &Machine, memory: &[Vec<u8>]) {
    for (region, bytes) in machine.regions().iter().zip(memory) {
        machine.write_memory(region.gpa, bytes).unwrap();
    }
}
