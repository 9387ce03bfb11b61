/* The guest's work: fill memory, dirty the working set at a rate, check it, keep the books. README.md explains the order of writes. */
#include "guest.h"

enum { STRIDE = 40503 }; /* odd, so x -> 5x + STRIDE visits all 2^k pages of a chunk before it repeats */
struct page_header {
    u32 magic[2], version, sequence;
};
extern volatile u8 report_page[];
struct report report = { .state = BOOTING, .batch_pages = BATCH };

static u32 chunk_base, chunk_pages, chunk_done, chunk_x; /* the power-of-two chunk that is being written; x in bytes */
static u32 ws_walk, low_walk, printed;
static u64 high_walk, credit, rate, gap_us;

/* Copies the books into the slot that hosts do not read, then makes it the one they do: whole at any instant. */
void publish(void) {
    volatile struct page_header *header = (void *)report_page;
    u32 next = header->sequence + 1, words = sizeof report / 4;
    void *to = (void *)(report_page + (next & 1 ? 1024 : 512)), *from = &report;
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
    header->sequence = next;
}

static void bad(u64 gpa, u32 expected, u32 actual, const char *what) {
    if (!report.errors++) {
        report.bad_gpa = gpa;
        report.bad_expected = expected;
        report.bad_actual = actual;
    }
    publish();
    if (printed++ < 16) /* then the heartbeat's count has to do */
        put("limosa-guest ERROR gpa=%x expected=%x actual=%x what=%s errors=%u\n", gpa, (u64)expected, (u64)actual, what,
            report.errors);
}

#define FILL(n) "movl $1, " #n "*4096(%0); movl %2, " #n "*4096+4(%0); movl %2, " #n "*4096+0x800(%0); movl %2, " #n \
                "*4096+0xffc(%0); addl %3, %2;"
/* Gives each page counter 1 and its tag in three places. */
void fill_pages(u32 address, u32 pages, u32 tag) {
    u32 eights = pages / 8;
    if (eights)
        __asm__ volatile("1:" FILL(0) FILL(1) FILL(2) FILL(3) FILL(4) FILL(5) FILL(6) FILL(7)
                         "addl $8*4096, %0; decl %1; jnz 1b"
                         : "+&r"(address), "+&r"(eights), "+&r"(tag) : "i"(TAG_STEP) : "memory", "cc");
    for (pages %= 8; pages; pages--, address += PAGE, tag += TAG_STEP)
        __asm__ volatile(FILL(0) : "+&r"(address), "+&r"(pages), "+&r"(tag) : "i"(0) : "memory", "cc");
}

static u32 step(u32 x) {
    return (config.sequential ? x + PAGE : 5 * x + STRIDE * PAGE) & (chunk_pages * PAGE - 1);
}

/* The batch again, page by page, after the fast loop met a page that is not what was left there (at bad_x). */
static void write_slowly(u32 x, u32 pages, u32 bad_x, u32 from_start) {
    u32 old = (u32)report.passes + 1;
    for (; pages; pages--) {
        x = step(x);
        from_start |= x == bad_x;
        if (!from_start)
            continue;
        volatile u32 *page = (void *)(chunk_base + x);
        if (*page != old)
            bad(chunk_base + x, old, *page, "counter");
        *page = old + 1;
    }
    chunk_x = x;
}

#define TOUCH(move) move "; andl %5, %0; cmpxchgl %4, (%3,%0); jne 2f;"
#define TOUCH8(move) "1:" TOUCH(move) TOUCH(move) TOUCH(move) TOUCH(move) TOUCH(move) TOUCH(move) TOUCH(move) TOUCH(move) \
                     "decl %1; jnz 1b; 2:"
#define RANDOM "leal 40503*4096(%0,%0,4), %0"
#define SEQUENTIAL "addl $4096, %0"
/* Raises the counters of the next pages of the pass (a multiple of 8) and proves that each was what it had to be. */
static void write_fast(u32 pages) {
    u32 x = chunk_x, left = pages / 8, actual = (u32)report.passes + 1, old = actual, mask = chunk_pages * PAGE - 1;
    if (config.sequential)
        __asm__ volatile(TOUCH8(SEQUENTIAL) : "+&r"(x), "+&r"(left), "+a"(actual)
                         : "r"(chunk_base), "r"(old + 1), "r"(mask) : "memory", "cc");
    else
        __asm__ volatile(TOUCH8(RANDOM) : "+&r"(x), "+&r"(left), "+a"(actual)
                         : "r"(chunk_base), "r"(old + 1), "r"(mask) : "memory", "cc");
    if (left)
        write_slowly(chunk_x, pages, x, 0);
    else
        chunk_x = x;
}

static void next_chunk(void) {
    u32 done = report.position, rest = (u32)report.ws_pages - done;
    if (!rest) {
        report.passes++;
        report.position = done = 0;
        rest = report.ws_pages;
    }
    chunk_pages = 1u << (31 - __builtin_clz(rest));
    chunk_base = (u32)report.ws_base + done * PAGE;
    chunk_done = chunk_x = 0;
}

static u32 write_batch(u64 elapsed_us) {
    u32 pages = BATCH;
    if (!rate)
        return 0;
    if (rate != ~0ull) {
        credit += (elapsed_us < 100000 ? elapsed_us : 100000) * rate;
        if (credit >> 32 > 0x40000)
            credit = 0x40000ull << 32;
        if (credit >> 32 < BATCH)
            pages = (u32)(credit >> 32) & ~7;
    }
    if (pages > chunk_pages - chunk_done)
        pages = chunk_pages - chunk_done;
    if (!pages)
        return 0;
    if (pages < 8)
        write_slowly(chunk_x, pages, 0, 1);
    else
        write_fast(pages);
    credit -= rate == ~0ull ? 0 : (u64)pages << 32;
    chunk_done += pages;
    report.position += pages;
    report.written += pages;
    report.counters_sum += pages;
    if (chunk_done == chunk_pages)
        next_chunk();
    return pages;
}

/* One page: its tag in all places, and a counter from low to low + spread. A filled page is put right, so it counts once. */
static void check_page(u32 address, u64 gpa, u32 low, u32 spread) {
    volatile u32 *page = (void *)address;
    u32 tag = (u32)(gpa >> 12) * TAG_STEP, counter = page[0];
    if (counter - low > spread)
        bad(gpa, low, counter, "walk");
    for (u32 i = 1; i < 1024; i += 511) { /* words 1, 512, 1023 */
        u32 actual = page[i];
        if (actual != tag) {
            bad(gpa + 4 * i, tag, actual, "tag");
            page[i] = tag;
        }
    }
}

static void walk(void) {
    u32 i;
    for (i = 0; i < config.check / 2 + 1; i++) {
        check_page((u32)report.ws_base + ws_walk * PAGE, report.ws_base + ws_walk * PAGE, report.passes + 1, report.position ? 1 : 0);
        if (++ws_walk == report.ws_pages) {
            ws_walk = 0;
            report.verified++;
        }
    }
    for (i = 0; report.low_pages && i < config.check / 2; i++) {
        check_page((u32)report.low_base + low_walk * PAGE, report.low_base + low_walk * PAGE, 1, 0);
        if (++low_walk == report.low_pages)
            low_walk = 0;
    }
}

static void walk_high(void) {
    u64 gpa = report.high_base + high_walk * PAGE;
    u32 address = high_window(gpa, 1);
    for (u32 i = 0; i < 8; i++, address += PAGE, gpa += PAGE) {
        check_page(address, gpa, 1, 0);
        if (++high_walk == report.high_pages) {
            high_walk = 0;
            break;
        }
        if (!((gpa + PAGE) & 0x3fffffff))
            break; /* the next GiB is another window */
    }
    high_window(0, 0);
}

static void place(void) {
    u64 free = (config.low_end - LOW_START) / PAGE, fill = config.fill / PAGE, done, part, gpa;
    report.ws_base = LOW_START;
    report.ws_pages = config.ws / PAGE;
    if (!report.ws_pages || report.ws_pages > free)
        fail("ws does not fit, free bytes", free * PAGE);
    free -= report.ws_pages;
    report.low_base = report.ws_base + report.ws_pages * PAGE;
    report.low_pages = fill < free ? fill : free;
    fill -= report.low_pages;
    free = (config.high_end - config.high_base) / PAGE;
    report.high_base = config.high_base;
    report.high_pages = fill < free ? fill : free;
    fill -= report.high_pages;
    if (fill && config.fill != ~0ull)
        fail("fill does not fit, missing bytes", fill * PAGE);
    report.counters_sum = report.ws_pages;
    report.state = FILLING;
    publish();
    fill_pages(report.ws_base, report.ws_pages + report.low_pages, (u32)(report.ws_base >> 12) * TAG_STEP);
    for (done = 0; done < report.high_pages; done += part) {
        gpa = report.high_base + done * PAGE;
        part = 0x40000 - ((gpa >> 12) & 0x3ffff);
        if (part > report.high_pages - done)
            part = report.high_pages - done;
        fill_pages(high_window(gpa, 1), part, (u32)(gpa >> 12) * TAG_STEP);
        high_window(0, 0);
    }
}

static void heartbeat(u64 now) {
    report.heartbeats++;
    report.uptime_us = now;
    put("limosa-guest heartbeat n=%l up_us=%l gap_us=%l gap_us_max=%l written=%l sum=%l passes=%l verified=%l errors=%u bad=%x "
        "rx=%l tx=%l backwards=%u kvmclock_ns=%l\n", report.heartbeats, now, gap_us, report.gap_us_max, report.written,
        report.counters_sum, report.passes, report.verified, report.errors, report.bad_gpa, report.rx_packets, report.tx_packets,
        report.clock_backwards, report.kvmclock_ns);
    gap_us = 0;
}

static void run(void) {
    u64 last = clock_us(), slow = last, beat = last, high = last;
    for (;;) {
        u64 now = clock_us(), gap = now - last;
        u32 busy;
        last = now;
        gap_us = max64(gap_us, gap);
        report.gap_us_max = max64(report.gap_us_max, gap);
        busy = write_batch(gap);
        if (busy)
            publish();
        busy |= net_poll();
        walk();
        console_poll();
        if (now - slow >= 10000) {
            slow = now;
            report.uptime_us = now;
            clock_check();
            console_input();
            publish();
        }
        if (report.high_pages && now - high >= 100000) {
            high = now;
            walk_high();
        }
        if (config.heartbeat_ms && now - beat >= config.heartbeat_ms * 1000ull) {
            beat = now - beat < 2000ull * config.heartbeat_ms ? beat + config.heartbeat_ms * 1000ull : now;
            heartbeat(now);
            publish();
        }
        if (!busy && console_idle())
            clock_sleep();
    }
}

void guest_main(u32 kind, u32 info) {
    volatile struct page_header *header = (void *)report_page;
    header->magic[0] = 0x4f4d494c; /* LIMOSAG1 */
    header->magic[1] = 0x31474153;
    header->version = 1;
    header->sequence = 0;
    publish();
    console_init();
    boot_read(kind, info);
    clock_init();
    net_init();
    for (u32 i = 0; i < 4; i++)
        report.ip = report.ip << 8 | config.ip[i];
    report.pattern = config.sequential;
    place();
    next_chunk();
    if (config.dirty >> 12 >= 1000000)
        rate = ~0ull;
    else
        rate = div64((config.dirty >> 12) << 32, 1000000);
    report.state = RUNNING;
    publish();
    put("limosa-guest ready version=1 ws_base=%x ws_pages=%l low_base=%x low_pages=%l high_base=%x high_pages=%l dirty=%l "
        "pattern=%s tsc_khz=%u fill_us=%l ip=%u.%u.%u.%u mac=%b:%b:%b:%b:%b:%b net=%u\n", report.ws_base, report.ws_pages,
        report.low_base, report.low_pages, report.high_base, report.high_pages, config.dirty,
        config.sequential ? "sequential" : "random", report.tsc_khz, clock_us(), config.ip[0], config.ip[1], config.ip[2],
        config.ip[3], report.mac[0], report.mac[1], report.mac[2], report.mac[3], report.mac[4], report.mac[5], report.net);
    console_flush();
    run();
}
