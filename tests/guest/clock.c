/* Time: the TSC, calibrated once; the watch on kvmclock; the LAPIC timer that ends a HLT. No wall clock. */
#include "guest.h"

static u32 us_per_tsc; /* in 2^-32 */
static u64 base_tsc, base_us, last_tsc;
static u32 lapic_ready, kvmclock_on;
static struct { u16 low, selector, kind, high; } idt[256] __attribute__((aligned(8)));
static volatile struct { u32 version, pad; u64 tsc, ns; u32 mul; signed char shift; u8 flags, more[2]; }
    pvclock __attribute__((aligned(64)));
extern char irq_stub[], trap_stub[];
void sleep_until_irq(void);

static void cpuid(u32 leaf, u32 *r) {
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "0"(leaf), "2"(0));
}

static u32 khz_kvmclock(void) {
    u32 r[4];
    cpuid(0x40000000, r);
    if (r[1] != 0x4b4d564b || r[2] != 0x564b4d56) /* KVMKVMKVM */
        return 0;
    cpuid(0x40000001, r);
    if (!(r[0] & 8))
        return 0;
    __asm__ volatile("wrmsr" : : "c"(0x4b564d01), "a"((u32)&pvclock | 1), "d"(0) : "memory");
    if (pvclock.mul <= 1000000)
        return 0;
    kvmclock_on = 1;
    u32 khz = div64(1000000ull << 32, pvclock.mul);
    return pvclock.shift < 0 ? khz << -pvclock.shift : khz >> pvclock.shift;
}

/* Counts TSC ticks while channel 0 of the PIT (1193.182 kHz), read by latching, counts down for 25 ms. 0 if there is no PIT. */
static u32 khz_pit(void) {
    outb(0x43, 0x34);
    outb(0x40, 0);
    outb(0x40, 0);
    u64 start = rdtsc();
    for (u32 spins = 0; spins < 1000000; spins++) {
        outb(0x43, 0);
        u32 count = inb(0x40);
        count |= inb(0x40) << 8;
        u32 ticks = -count & 0xffff;
        if (ticks >= 29830)
            return div64((rdtsc() - start) * 1193, ticks);
    }
    return 0;
}

static void lapic_init(void) {
    u32 low, high;
    struct { u16 size; u32 base; } __attribute__((packed)) pointer = { sizeof idt - 1, (u32)idt };
    for (u32 i = 0; i < 256; i++) {
        u32 stub = i < 32 ? (u32)trap_stub : (u32)irq_stub;
        idt[i].low = stub;
        idt[i].selector = 8;
        idt[i].kind = 0x8e00;
        idt[i].high = stub >> 16;
    }
    __asm__ volatile("lidt %0" : : "m"(pointer));
    outb(0x21, 0xff); /* no interrupt but ours */
    outb(0xa1, 0xff);
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0x1b));
    if ((low & 0xfffffc00) != 0xfee00800)
        return; /* no LAPIC at its usual place (or in x2APIC mode): stay awake */
    *(volatile u32 *)0xfee000f0 = 0x1ff; /* enabled */
    *(volatile u32 *)0xfee003e0 = 0xb;   /* divide by 1 */
    *(volatile u32 *)0xfee00320 = 0x20;  /* one-shot, vector 32 */
    lapic_ready = 1;
}

void clock_init(void) {
    u32 khz = khz_kvmclock();
    if (!khz)
        khz = khz_pit();
    if (khz <= 1000 || khz > 100000000)
        fail("neither kvmclock nor a PIT to calibrate the TSC by, kHz", khz);
    report.tsc_khz = khz;
    us_per_tsc = div64(1000ull << 32, khz);
    base_tsc = last_tsc = rdtsc();
    lapic_init();
}

/* Microseconds since clock_init; never goes back: a TSC that does is counted and forgiven. */
u64 clock_us(void) {
    u64 now = rdtsc();
    if (now < last_tsc) {
        report.clock_backwards++;
        base_us += scale(last_tsc - base_tsc, us_per_tsc);
        base_tsc = now;
    }
    last_tsc = now;
    return base_us + scale(now - base_tsc, us_per_tsc);
}

/* kvmclock must not go back either, not even over a migration. */
void clock_check(void) {
    u64 ns, delta;
    u32 version;
    if (!kvmclock_on)
        return;
    do {
        version = pvclock.version;
        barrier();
        delta = rdtsc() - pvclock.tsc;
        delta = pvclock.shift < 0 ? delta >> -pvclock.shift : delta << pvclock.shift;
        ns = pvclock.ns + scale(delta, pvclock.mul);
        barrier();
    } while ((version & 1) || version != pvclock.version);
    report.clock_backwards += ns < report.kvmclock_ns;
    report.kvmclock_ns = ns;
}

/* HLT for about 1 ms (the LAPIC timer of every hypervisor known runs at 1 GHz). */
void clock_sleep(void) {
    if (!lapic_ready)
        return;
    *(volatile u32 *)0xfee00380 = 1000000;
    sleep_until_irq();
}
