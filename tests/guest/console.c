/* The 16550 at 0x3f8 behind a ring, so that a line costs the main loop 16 characters at a time; and the ways to stop. */
#include <stdarg.h>
#include "guest.h"

enum { COM = 0x3f8, RING = 4096 };
static char ring[RING];
static u32 head, tail;

void console_init(void) {
    outb(COM + 1, 0); /* no interrupts */
    outb(COM + 3, 3); /* 8N1; nobody has changed the divisor */
    outb(COM + 2, 7); /* FIFOs */
}

u32 console_idle(void) { return head == tail; }

void console_poll(void) {
    if (head == tail || !(inb(COM + 5) & 0x20))
        return;
    for (u32 i = 0; i < 16 && head != tail; i++)
        outb(COM, ring[tail++ % RING]);
}

void console_flush(void) {
    for (u32 spins = 0; head != tail && spins < 1000000; spins++)
        console_poll();
}

/* Powers off when the host sent a q. */
void console_input(void) {
    static const struct { u16 size; u32 base; } __attribute__((packed)) no_idt = { 0, 0 };
    if (!(inb(COM + 5) & 1) || inb(COM) != 'q')
        return;
    put("limosa-guest poweroff\n");
    console_flush();
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
    char digits[24];
    u32 n = 0;
    do {
        u32 high = (u32)(v >> 32);
        u32 q = div64((u64)(high % base) << 32 | (u32)v, base);
        digits[n++] = "0123456789abcdef"[(u32)v - q * base];
        v = (u64)(high / base) << 32 | q;
    } while (v);
    while (n)
        put_char(digits[--n]);
}

static void put_text(const char *s) {
    while (*s)
        put_char(*s++);
}

/* %s string, %u u32, %l u64, %x u64 in hex with 0x */
void put(const char *f, ...) {
    va_list a;
    va_start(a, f);
    for (; *f; f++) {
        if (*f != '%') {
            put_char(*f);
        } else if (*++f == 's') {
            put_text(va_arg(a, const char *));
        } else if (*f == 'x') {
            put_text("0x");
            put_number(va_arg(a, u64), 16);
        } else {
            put_number(*f == 'l' ? va_arg(a, u64) : va_arg(a, u32), 10);
        }
    }
    va_end(a);
}

void fail(const char *why, u64 value) {
    report.state = FAILED;
    publish();
    put("limosa-guest FAILED %s %x\n", why, value);
    console_flush();
    for (;;) { /* stays readable, and can be ended */
        console_input();
        clock_sleep();
    }
}
