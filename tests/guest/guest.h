/* What the parts of the guest share. README.md says what the guest is for and documents everything a host can see. */
#pragma once
#include <stdint.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
enum { PAGE = 4096, BATCH = 256, LOW_START = 0x1000000 };
enum { BOOTING = 1, FILLING = 2, RUNNING = 3, FAILED = 4 };
#define ALL (~0ull) /* a size or rate of "max" */

/* The body of the report; README.md has the offsets. */
struct range { u64 base, pages; };
struct report {
    u32 state, errors;
    u64 heartbeats, gap_us_max, written, counters_sum, passes, verified;
    u32 position, batch_pages;
    u64 bad_gpa;
    u32 bad_expected, bad_actual;
    u64 rx_packets, tx_packets;
    struct range ws, low, high;
    u64 uptime_us, kvmclock_ns;
    u32 tsc_khz, clock_backwards, sequential, ip;
    u8 mac[6], net, reserved;
};
_Static_assert(sizeof(struct report) == 184, "hosts know its layout");
extern struct report report;

struct config {
    u64 ws, fill, dirty, heartbeat_ms; /* bytes, bytes, bytes a second, or ALL */
    u64 low_end, high_base, high_end; /* RAM that may be used: LOW_START..low_end and high_base..high_end */
};
extern struct config config;

static inline void outb(u16 port, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 rdtsc(void) { u64 v; __asm__ volatile("rdtsc" : "=A"(v)); return v; }
static inline void barrier(void) { __asm__ volatile("lock; addl $0, (%%esp)" : : : "memory", "cc"); }
/* n / d for a quotient below 2^32 (the caller sees to it); there is no 64-bit division here. */
static inline u32 div64(u64 n, u32 d) {
    u32 q, r;
    __asm__("divl %4" : "=a"(q), "=d"(r) : "0"((u32)n), "1"((u32)(n >> 32)), "r"(d));
    return q;
}
/* d * m / 2^32 */
static inline u64 scale(u64 d, u32 m) { return (d >> 32) * m + (((d & 0xffffffffu) * m) >> 32); }
static inline u64 min64(u64 a, u64 b) { return a < b ? a : b; }
static inline u64 max64(u64 a, u64 b) { return a > b ? a : b; }

void machine_init(u32 start_info, u32 boot_params); /* machine.c */
void put(const char *format, ...);
u32 console_poll(void);
void console_input(void);
u64 clock_us(void);
void clock_check(void);
void fail(const char *why, u64 value) __attribute__((noreturn));
void clock_sleep(void);                             /* start.S */
void net_init(u32 address);                         /* net.c */
u32 net_poll(void);
void publish(void);                                 /* main.c */
