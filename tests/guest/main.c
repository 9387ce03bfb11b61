/* The guest's work: fill memory, dirty the working set at a rate, check it, keep the books. README.md explains the order of writes. */
#include "guest.h"

#define TAG_STEP 0x9e3779b1u /* odd: the tag of page n is n * TAG_STEP, so no two pages have the same */
#define CREDIT_MAX (0x40000ull << 32)
enum { STRIDE = 40503 }; /* odd, so x -> 5x + STRIDE visits all 2^k pages of a chunk before it repeats */
extern volatile struct { u32 magic[2], version, sequence; u8 rest[PAGE - 16]; } report_page;
struct report report = { .state = BOOTING, .batch_pages = BATCH };

static u32 chunk_base, chunk_pages, chunk_done, chunk_x; /* the power-of-two chunk that is being written; x in bytes */
static u64 credit, rate; /* pages that may be written now, and a µs; in 2^-32 */
static u64 ws_walk, low_walk, high_walk, gap_us;

/* Copies the books into the slot that hosts do not read, then makes it the one they do: whole at any instant. */
void publish(void) {
    u32 next = report_page.sequence + 1, words = sizeof report / 4;
    void *to = (u8 *)&report_page + (next & 1 ? 1024 : 512), *from = &report;
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
    report_page.sequence = next;
}

static void bad(u64 gpa, u32 expected, u32 actual, const char *what) {
    if (!report.errors++) {
        report.bad_gpa = gpa;
        report.bad_expected = expected;
        report.bad_actual = actual;
    }
    publish();
    if (report.errors <= 16) /* then the heartbeat's count has to do */
        put("limosa-guest ERROR gpa=%x expected=%x actual=%x what=%s errors=%u\n", gpa, (u64)expected, (u64)actual, what,
            report.errors);
}

/* Gives each page counter 1 and its tag in three places. */
static void fill(const struct range *range) {
    for (u64 done = 0, part; done < range->pages; done += part) {
        u64 gpa = range->base + done * PAGE;
        u32 address = window_open(gpa), tag = (u32)(gpa / PAGE) * TAG_STEP;
        part = min64(range->pages - done, 0x40000 - (gpa / PAGE) % 0x40000); /* to the end of the window */
#pragma GCC unroll 8
        for (u32 left = part; left; left--, address += PAGE, tag += TAG_STEP) {
            volatile u32 *page = (void *)address;
            page[0] = 1;
            page[1] = page[512] = page[1023] = tag;
        }
    }
    window_close();
}

static void next_chunk(void) {
    u32 done = report.position, rest = (u32)report.ws.pages - done;
    if (!rest) {
        report.passes++;
        report.position = done = 0;
        rest = report.ws.pages;
    }
    chunk_pages = 1u << (31 - __builtin_clz(rest));
    chunk_base = (u32)report.ws.base + done * PAGE;
    chunk_done = chunk_x = 0;
}

/* Eight pages a turn, since emulation is paid by the instruction; ends early, with x there, at a page that is not `old`. */
#define WRITE_EIGHTS(step) \
    __asm__ volatile("1: .rept 8; " step "; andl %5, %0; cmpxchgl %4, (%3,%0); jne 2f; .endr; decl %1; jnz 1b; 2:" \
                     : "+&r"(x), "+&r"(eights), "+&a"(actual) : "r"(chunk_base), "r"(old + 1), "r"(mask) : "memory", "cc")

/* Raises the counters of the next pages of the pass, fewer than 8 or a multiple, and proves that each was what it had to be. */
static void write_pages(u32 pages) {
    u32 x = chunk_x, eights = pages / 8, old = (u32)report.passes + 1, actual = old, mask = chunk_pages * PAGE - 1, met;
    if (eights && report.sequential)
        WRITE_EIGHTS("addl $4096, %0");
    else if (eights)
        WRITE_EIGHTS("leal 40503*4096(%0,%0,4), %0");
    if (pages >= 8 && !eights) {
        chunk_x = x;
        return;
    }
    /* Page by page: all of them if they are few; or, after a bad page, its own way again up to it and on from there. */
    u32 bad_x = x, written = pages >= 8;
    for (x = chunk_x; pages; pages--) {
        x = (report.sequential ? x + PAGE : 5 * x + STRIDE * PAGE) & mask;
        written = written && x != bad_x;
        volatile u32 *page = (void *)(chunk_base + x);
        met = *page;
        if (!written && met != old)
            bad(chunk_base + x, old, met, "counter");
        *page = old + 1;
    }
    chunk_x = x;
}

/* Writes what the rate allows; returns how many pages. */
static u32 write_batch(u64 elapsed_us) {
    credit = rate == ALL ? CREDIT_MAX : min64(credit + min64(elapsed_us, 100000) * rate, CREDIT_MAX);
    u32 pages = min64(min64(credit >> 32, BATCH) & ~7, chunk_pages - chunk_done);
    if (!pages)
        return 0;
    write_pages(pages);
    credit -= (u64)pages << 32;
    chunk_done += pages;
    report.position += pages;
    report.written += pages;
    report.counters_sum += pages;
    if (chunk_done == chunk_pages)
        next_chunk();
    return pages;
}

/* One page: its tag in all places, and a counter from low to low + spread. A bad tag is put right, so it counts once. */
static void check_page(volatile u32 *page, u64 gpa, u32 low, u32 spread) {
    u32 tag = (u32)(gpa / PAGE) * TAG_STEP, counter = page[0];
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

/* Checks some pages of a range from `at` on; returns 1 at its end. */
static u32 walk(const struct range *range, u64 *at, u32 pages, u32 low, u32 spread) {
    u64 gpa = range->base + *at * PAGE;
    u32 address = window_open(gpa), end = 0;
    do {
        check_page((void *)address, gpa, low, spread);
        gpa += PAGE;
        address += PAGE;
        end = ++*at == range->pages;
    } while (!end && --pages && gpa & 0x3fffffff); /* the next GiB is another window */
    if (end)
        *at = 0;
    window_close();
    return end;
}

/* Gives `range` as many of the wanted pages as there are; returns how many are wanting. */
static u64 take(struct range *range, u64 base, u64 end, u64 wanted) {
    range->base = base;
    range->pages = min64(wanted, (end - base) / PAGE);
    return wanted - range->pages;
}

static void place(void) {
    u64 wanting = take(&report.ws, LOW_START, config.low_end, config.ws / PAGE);
    if (wanting || !report.ws.pages)
        fail("ws does not fit, missing bytes", wanting * PAGE);
    wanting = take(&report.low, LOW_START + report.ws.pages * PAGE, config.low_end, config.fill / PAGE);
    wanting = take(&report.high, config.high_base, config.high_end, wanting);
    if (wanting && config.fill != ALL)
        fail("fill does not fit, missing bytes", wanting * PAGE);
    report.counters_sum = report.ws.pages;
    report.state = FILLING;
    publish();
    fill(&report.ws);
    fill(&report.low);
    fill(&report.high);
}

static void heartbeat(u64 now) {
    report.heartbeats++;
    put("limosa-guest heartbeat n=%l up_us=%l gap_us=%l gap_us_max=%l written=%l sum=%l passes=%l verified=%l errors=%u bad=%x "
        "rx=%l tx=%l backwards=%u kvmclock_ns=%l\n", report.heartbeats, now, gap_us, report.gap_us_max, report.written,
        report.counters_sum, report.passes, report.verified, report.errors, report.bad_gpa, report.rx_packets, report.tx_packets,
        report.clock_backwards, report.kvmclock_ns);
    gap_us = 0;
}

/* What is done at times: the host's input and the clocks each 10 ms, RAM above 4 GiB each 100 ms, and the heartbeat. */
static void housekeeping(u64 now) {
    static u64 slow, high, beat;
    u64 period = config.heartbeat_ms * 1000ull;
    if (report.high.pages && now - high >= 100000) {
        high = now;
        walk(&report.high, &high_walk, 8, 1, 0);
    }
    if (now - slow < 10000 && !(period && now - beat >= period))
        return;
    slow = report.uptime_us = now;
    clock_check();
    console_input();
    if (period && now - beat >= period) {
        beat = now - beat < 2 * period ? beat + period : now;
        heartbeat(now);
    }
    publish();
}

static void run(void) {
    for (u64 last = clock_us();;) {
        u64 now = clock_us(), gap = now - last;
        last = now;
        gap_us = max64(gap_us, gap);
        report.gap_us_max = max64(report.gap_us_max, gap);
        u32 busy = write_batch(gap);
        if (busy)
            publish();
        busy |= net_poll();
        report.verified += walk(&report.ws, &ws_walk, 9, report.passes + 1, report.position > 0);
        if (report.low.pages)
            walk(&report.low, &low_walk, 8, 1, 0);
        console_poll();
        housekeeping(now);
        if (!busy && console_idle())
            clock_sleep();
    }
}

void guest_main(u32 pvh, u32 info) {
    report_page.magic[0] = 0x4f4d494c; /* LIMOSAG1 */
    report_page.magic[1] = 0x31474153;
    report_page.version = 1;
    report_page.sequence = 0;
    publish();
    console_init();
    boot_read(pvh, info);
    clock_init();
    net_init();
    place();
    next_chunk();
    u64 pages_a_second = config.dirty / PAGE;
    rate = pages_a_second >= 1000000 ? ALL : div64(pages_a_second << 32, 1000000);
    report.state = RUNNING;
    publish();
    u32 ip = report.ip;
    put("limosa-guest ready version=1 ws_base=%x ws_pages=%l low_base=%x low_pages=%l high_base=%x high_pages=%l dirty=%l "
        "pattern=%s tsc_khz=%u fill_us=%l ip=%u.%u.%u.%u net=%u\n", report.ws.base, report.ws.pages, report.low.base,
        report.low.pages, report.high.base, report.high.pages, config.dirty, report.sequential ? "sequential" : "random",
        report.tsc_khz, clock_us(), ip >> 24, ip >> 16 & 255, ip >> 8 & 255, ip & 255, report.net);
    console_flush();
    run();
}
