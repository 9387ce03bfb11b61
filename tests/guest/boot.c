/* What the loader handed over: command line and memory map, from hvm_start_info or from boot_params. Not the use of either. */
#include "guest.h"

struct config config = { .ws = 16 << 20, .heartbeat_ms = 1000, .check = 16 };
static char line[2048];

static u64 low64(u32 a) { return *(volatile u64 *)a; }

static void ram(u64 base, u64 size, u32 type) {
    u64 end = base + size, limit = 0xc0000000u;
    if (type != 1 || end <= base)
        return;
    if (base <= LOW_START && end > LOW_START)
        config.low_end = end < limit ? end : limit;
    if (end > (1ull << 32) && !config.high_end) {
        config.high_base = base > (1ull << 32) ? base : 1ull << 32;
        config.high_end = end;
    }
}

static int key(const char **at, const char *name) {
    const char *p = *at;
    while (*name)
        if (*p++ != *name++)
            return 0;
    *at = p;
    return 1;
}

static u64 number(const char **at) {
    u64 v = 0;
    u32 base = 10, digit;
    if (key(at, "0x"))
        base = 16;
    if (key(at, "max"))
        return ~0ull;
    for (;; (*at)++) {
        char c = **at | 0x20;
        if (c >= '0' && c <= '9') digit = c - '0';
        else if (base == 16 && c >= 'a' && c <= 'f') digit = c - 'a' + 10;
        else break;
        v = v * base + digit;
    }
    switch (**at | 0x20) {
    case 'k': v <<= 10; break;
    case 'm': v <<= 20; break;
    case 'g': v <<= 30; break;
    default: return v;
    }
    (*at)++;
    return v;
}

static void word(const char *p) {
    if (key(&p, "ws=")) config.ws = number(&p);
    else if (key(&p, "fill=")) config.fill = number(&p);
    else if (key(&p, "dirty=")) config.dirty = number(&p);
    else if (key(&p, "heartbeat=")) config.heartbeat_ms = number(&p);
    else if (key(&p, "check=")) config.check = number(&p);
    else if (key(&p, "tsc_khz=")) config.tsc_khz = number(&p);
    else if (key(&p, "pattern=sequential")) config.sequential = 1;
    else if (key(&p, "idle=poll")) config.poll = 1;
    else if (key(&p, "ip=")) {
        for (u32 i = 0; i < 4; i++) {
            config.ip[i] = number(&p);
            if (*p == '.') p++;
        }
    } else if (key(&p, "virtio_mmio.device=")) {
        number(&p);
        if (*p++ == '@' && config.mmio_count < 8)
            config.mmio[config.mmio_count++] = number(&p);
    }
}

void boot_read(u32 kind, u32 info) {
    u32 text, map, entries, entry_size, i;
    if (kind == 1) { /* hvm_start_info */
        if (*(volatile u32 *)info != 0x336ec578)
            fail("start_info magic", *(volatile u32 *)info);
        text = low64(info + 24);
        map = low64(info + 40);
        entries = *(volatile u32 *)(info + 4) >= 1 ? *(volatile u32 *)(info + 48) : 0;
        entry_size = 24;
    } else { /* boot_params */
        text = *(volatile u32 *)(info + 0x228);
        map = info + 0x2d0;
        entries = *(volatile u8 *)(info + 0x1e8);
        entry_size = 20;
    }
    for (i = 0; i < entries; i++, map += entry_size)
        ram(low64(map), low64(map + 8), *(volatile u32 *)(map + 16));
    for (i = 0; text && i < sizeof line - 1 && ((const char *)text)[i]; i++)
        line[i] = ((const char *)text)[i];
    for (const char *p = line; *p;) {
        while (*p == ' ') p++;
        word(p);
        while (*p && *p != ' ') p++;
    }
    if (!config.low_end)
        fail("no RAM at 16 MiB, memory map entries", entries);
}
