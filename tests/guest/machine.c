/* The machine the guest finds: the serial port behind a ring (a line costs the main loop 16 characters at a time), the
   ways to stop, the TSC and the watch on kvmclock, command line and memory map. Not the network. */
#include <stdarg.h>
#include "guest.h"

enum { COM = 0x3f8, RING = 4096 };
static char ring[RING];
static u32 head, tail;
static u32 us_per_tsc; /* in 2^-32 */
static u64 ticks, last_tsc;
static volatile struct { u32 version, pad; u64 tsc, ns; u32 mul; signed char shift; u8 flags, more[2]; }
    pvclock __attribute__((aligned(64))); /* all 0 without kvmclock */
struct config config = { .ws = 16 << 20, .heartbeat_ms = 1000 };

/* Sends some of what waits; returns whether anything did. */
u32 console_poll(void) {
    if (head == tail)
        return 0;
    u32 room = inb(COM + 5) & 0x20 ? 16 : 0;
    for (; room && head != tail; room--)
        outb(COM, ring[tail++ % RING]);
    return 1;
}

/* Powers off when the host sent a q. */
void console_input(void) {
    static const u8 no_idt[6];
    if (!(inb(COM + 5) & 1) || inb(COM) != 'q')
        return;
    put("limosa-guest poweroff\n");
    for (u32 spins = 0; console_poll() && spins < 1000000; spins++) {}
    outb(0x600, 0x34);   /* Cloud Hypervisor: S5 and sleep enable */
    outw(0x604, 0x2000); /* QEMU pc and q35: PM1a_CNT */
    outb(0x64, 0xfe);    /* keyboard controller: reset; else a triple fault */
    __asm__ volatile("lidt %0; ud2" : : "m"(no_idt));
}

static void put_char(char c) {
    if (head - tail < RING) /* a full ring drops: the guest never waits for its reader */
        ring[head++ % RING] = c;
}

static void put_number(u64 v, u32 base) {
    u32 high = (u32)(v >> 32), low = div64((u64)(high % base) << 32 | (u32)v, base);
    u64 rest = (u64)(high / base) << 32 | low;
    if (rest)
        put_number(rest, base);
    put_char("0123456789abcdef"[(u32)v - low * base]);
}

/* %s string, %u u32, %l u64, %x u64 in hex */
void put(const char *f, ...) {
    va_list a;
    va_start(a, f);
    for (; *f; f++) {
        if (*f != '%')
            put_char(*f);
        else if (*++f == 's')
            for (const char *s = va_arg(a, const char *); *s; s++)
                put_char(*s);
        else
            put_number(*f == 'u' ? va_arg(a, u32) : va_arg(a, u64), *f == 'x' ? 16 : 10);
    }
    va_end(a);
}

void fail(const char *why, u64 value) {
    report.state = FAILED;
    publish();
    put("limosa-guest FAILED %s 0x%x\n", why, value);
    for (;;) { /* stays readable, and can be ended */
        console_poll();
        console_input();
        clock_sleep();
    }
}

static u32 khz_kvmclock(void) {
    u32 features, signature, kvm = 0x40000000;
    __asm__ volatile("cpuid" : "+a"(kvm), "=b"(signature) : : "ecx", "edx");
    __asm__ volatile("cpuid" : "=a"(features) : "0"(0x40000001) : "ebx", "ecx", "edx");
    if (signature != 0x4b4d564b || !(features & 8)) /* KVMK; new kvmclock */
        return 0;
    __asm__ volatile("wrmsr" : : "c"(0x4b564d01), "a"((u32)&pvclock | 1), "d"(0) : "memory");
    if (pvclock.mul <= 1000000)
        return 0;
    u32 khz = div64(1000000ull << 32, pvclock.mul);
    return pvclock.shift < 0 ? khz << -pvclock.shift : khz >> pvclock.shift;
}

/* Counts TSC ticks while channel 0 of the PIT (1193.182 kHz, read by latching) counts for 25 ms. 0 without a PIT. */
static u32 khz_pit(void) {
    outb(0x43, 0x34);
    outb(0x40, 0);
    outb(0x40, 0);
    u64 start = rdtsc();
    for (u32 spins = 0; spins < 1000000; spins++) {
        outb(0x43, 0);
        u32 count = inb(0x40);
        count = -(count | inb(0x40) << 8) & 0xffff;
        if (count >= 29830)
            return div64((rdtsc() - start) * 1193, count);
    }
    return 0;
}

/* Microseconds since machine_init; never goes back: a TSC that does is counted and forgiven. */
u64 clock_us(void) {
    u64 now = rdtsc();
    if (now < last_tsc)
        report.clock_backwards++;
    else
        ticks += now - last_tsc;
    last_tsc = now;
    return scale(ticks, us_per_tsc);
}

/* kvmclock must not go back either, not even over a migration. */
void clock_check(void) {
    u64 ns, delta;
    u32 version;
    if (!pvclock.mul)
        return;
    do { /* until the host did not update it meanwhile */
        version = pvclock.version;
        delta = rdtsc() - pvclock.tsc;
        delta = pvclock.shift < 0 ? delta >> -pvclock.shift : delta << pvclock.shift;
        ns = pvclock.ns + scale(delta, pvclock.mul);
    } while (version != pvclock.version);
    report.clock_backwards += ns < report.kvmclock_ns;
    report.kvmclock_ns = ns;
}

static u64 peek(u32 a) { return *(volatile u64 *)a; }

static void ram(u64 base, u64 end) {
    if (base <= LOW_START && end > LOW_START)
        config.low_end = min64(end, 0xc0000000u); /* devices follow */
    if (end > (1ull << 32) && !config.high_end) {
        config.high_base = max64(base, 1ull << 32);
        config.high_end = end;
    }
}

static u32 key(const char **at, const char *name) {
    const char *p = *at;
    while (*name)
        if (*p++ != *name++)
            return 0;
    *at = p;
    return 1;
}

static u64 number(const char **at) {
    u64 v = 0;
    if (key(at, "max"))
        return ALL;
    u32 base = key(at, "0x") ? 16 : 10;
    for (;; (*at)++) {
        u8 c = **at | 0x20, digit = c >= 'a' ? c - 'a' + 10 : c <= '9' ? c - '0' : 255; /* wraps below 0 */
        if (digit >= base)
            break;
        v = v * base + digit;
    }
    return v << (key(at, "K") ? 10 : key(at, "M") ? 20 : key(at, "G") ? 30 : 0);
}

static void word(const char *p) {
    static const struct { const char *name; u64 *value; } numbers[] = {
        {"ws=", &config.ws}, {"fill=", &config.fill}, {"dirty=", &config.dirty}, {"heartbeat=", &config.heartbeat_ms},
    };
    for (u32 i = 0; i < 4; i++)
        if (key(&p, numbers[i].name))
            *numbers[i].value = number(&p);
    report.sequential |= key(&p, "pattern=sequential");
    if (key(&p, "ip="))
        for (u32 i = 0; i < 4; i++, key(&p, "."))
            report.ip = report.ip << 8 | (u8)number(&p);
    if (key(&p, "virtio_mmio.device=") && number(&p) && key(&p, "@"))
        net_init(number(&p));
}

/* start_info is 0 if the loader left boot_params instead. */
void machine_init(u32 start_info, u32 boot_params) {
    outb(COM + 3, 3); /* 8N1 */
    outb(COM + 2, 1); /* FIFOs */
    outb(0x21, 0xff); /* no interrupt but the LAPIC timer's, which ends clock_sleep (start.S) */
    outb(0xa1, 0xff);
    *(volatile u32 *)0xfee000f0 = 0x120; /* enabled */
    *(volatile u32 *)0xfee003e0 = 0xb;   /* divide by 1 */
    *(volatile u32 *)0xfee00320 = 0x20;  /* one-shot, vector 32 */
    report.tsc_khz = khz_kvmclock() ?: khz_pit();
    if (report.tsc_khz <= 1000 || report.tsc_khz > 100000000)
        fail("neither kvmclock nor a PIT to calibrate the TSC by, kHz", report.tsc_khz);
    us_per_tsc = div64(1000ull << 32, report.tsc_khz);
    last_tsc = rdtsc();
    const char *line = (const char *)(u32)(start_info ? peek(start_info + 24) : peek(boot_params + 0x228));
    u32 map = start_info ? (u32)peek(start_info + 40) : boot_params + 0x2d0, entry_bytes = start_info ? 24 : 20;
    u32 entries = start_info ? (u32)peek(start_info + 48) : (u8)peek(boot_params + 0x1e8);
    for (u32 i = 0; i < entries; i++, map += entry_bytes)
        if ((u32)peek(map + 16) == 1)
            ram(peek(map), peek(map) + peek(map + 8));
    for (const char *at = line; at && *at; at++)
        if (at == line || at[-1] == ' ')
            word(at);
    if (!config.low_end)
        fail("the memory map has no RAM at 16 MiB, entries", entries);
}
