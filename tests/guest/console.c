/* The 16550 at 0x3f8 behind a ring, so that a line costs the main loop 16 characters at a time; and the ways to stop. */
#include <stdarg.h>
#include "guest.h"

enum { COM = 0x3f8, RING = 8192 };
static char ring[RING];
static u32 head, tail;

void console_init(void) {
    outb(COM + 1, 0);
    outb(COM + 3, 0x80); /* 115,200 8N1 */
    outb(COM, 1);
    outb(COM + 1, 0);
    outb(COM + 3, 3);
    outb(COM + 2, 7);
    outb(COM + 4, 3);
}

int console_idle(void) { return head == tail; }

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

void console_input(void) {
    if (!(inb(COM + 5) & 1) || inb(COM) != 'q')
        return;
    put("limosa-guest poweroff\n");
    console_flush();
    power_off();
}

void power_off(void) {
    static const struct { u16 size; u32 base; } __attribute__((packed)) no_idt = { 0, 0 };
    outb(0x600, 0x34);  /* Cloud Hypervisor: S5 and sleep enable */
    outb(0x3c0, 0x34);
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
        u32 high = (u32)(v >> 32), rest = high % base;
        u64 low = (u64)rest << 32 | (u32)v;
        u32 q = div64(low, base);
        digits[n++] = "0123456789abcdef"[(u32)v - q * base];
        v = (u64)(high / base) << 32 | q;
    } while (v);
    while (n)
        put_char(digits[--n]);
}

/* %s string, %u u32, %l u64, %x u64 in hex with 0x, %b two hex digits of a u32 */
void put(const char *f, ...) {
    va_list a;
    va_start(a, f);
    for (; *f; f++) {
        if (*f != '%') { put_char(*f); continue; }
        switch (*++f) {
        case 's': for (const char *s = va_arg(a, const char *); *s; s++) put_char(*s); break;
        case 'u': put_number(va_arg(a, u32), 10); break;
        case 'l': put_number(va_arg(a, u64), 10); break;
        case 'x': put_char('0'); put_char('x'); put_number(va_arg(a, u64), 16); break;
        case 'b': { u32 v = va_arg(a, u32); put_number(v >> 4 & 15, 16); put_number(v & 15, 16); break; }
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

void guest_trap(u32 first, u32 second) {
    fail("exception, top of stack", (u64)second << 32 | first);
}
