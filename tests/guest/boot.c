/* What the loader handed over: command line and memory map, from hvm_start_info or from boot_params. Not the use of either. */
#include "guest.h"

struct config config = { .ws = 16 << 20, .heartbeat_ms = 1000 };

static u64 peek(u32 a) { return *(volatile u64 *)a; }

static void ram(u64 base, u64 size, u32 type) {
    u64 end = base + size;
    if (type != 1 || end <= base)
        return;
    if (base <= LOW_START && end > LOW_START)
        config.low_end = min64(end, 0xc0000000u); /* above are devices */
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
        u8 c = **at | 0x20, digit = c >= 'a' ? c - 'a' + 10 : (u8)(c - '0');
        if (digit >= base)
            break;
        v = v * base + digit;
    }
    u32 shift = key(at, "K") ? 10 : key(at, "M") ? 20 : key(at, "G") ? 30 : 0;
    return v << shift;
}

static void word(const char *p) {
    if (key(&p, "ws=")) {
        config.ws = number(&p);
    } else if (key(&p, "fill=")) {
        config.fill = number(&p);
    } else if (key(&p, "dirty=")) {
        config.dirty = number(&p);
    } else if (key(&p, "heartbeat=")) {
        config.heartbeat_ms = number(&p);
    } else if (key(&p, "pattern=sequential")) {
        report.sequential = 1;
    } else if (key(&p, "ip=")) {
        for (u32 i = 0; i < 4; i++, key(&p, "."))
            report.ip = report.ip << 8 | (u8)number(&p);
    } else if (key(&p, "virtio_mmio.device=")) {
        number(&p);
        if (key(&p, "@") && config.mmio_count < 8)
            config.mmio[config.mmio_count++] = number(&p);
    }
}

void boot_read(u32 pvh, u32 info) {
    if (pvh && (u32)peek(info) != 0x336ec578)
        fail("start_info magic", (u32)peek(info));
    const char *line = (const char *)(u32)peek(info + (pvh ? 24 : 0x228));
    u32 map = pvh ? (u32)peek(info + 40) : info + 0x2d0, entry_bytes = pvh ? 24 : 20;
    u32 entries = !pvh ? (u8)peek(info + 0x1e8) : peek(info + 4) & 0xffffffff ? (u32)peek(info + 48) : 0;
    for (; entries; entries--, map += entry_bytes)
        ram(peek(map), peek(map + 8), (u32)peek(map + 16));
    while (line && *line) {
        while (*line == ' ')
            line++;
        word(line);
        while (*line && *line != ' ')
            line++;
    }
    if (!config.low_end)
        fail("the memory map has no RAM at 16 MiB, info at", info);
}
