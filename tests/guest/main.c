/* The guest's work: fill memory, dirty the working set at a rate, check it, keep the books. README.md has the order. */
#include "guest.h"

#define TAG_STEP 0x9e3779b1u /* odd: the tag of page n is n * TAG_STEP, so no two pages have the same */
#define CREDIT_MAX (0x40000ull << 32)
enum { STRIDE = 40503 }; /* odd, so x -> 5x + STRIDE visits all 2^k pages of a chunk before it repeats */
extern u8 report_page[PAGE];
struct report report = { .state = BOOTING, .batch_pages = BATCH };

static u32 chunk_base, chunk_pages, chunk_end, chunk_x; /* the power-of-two chunk that is being written; x in bytes */
static u64 credit, rate; /* pages that may be written now, and that a µs adds; in 2^-32 */

/* Copies the books into the slot that hosts do not read, then makes it the one they do: whole at any instant. */
void publish(void) {
    static u32 sequence;
    __builtin_memcpy(report_page + (++sequence & 1 ? 1024 : 512), &report, sizeof report);
    barrier();
    *(volatile u32 *)(report_page + 12) = sequence;
}

static void bad(u64 gpa, u32 expected, u32 actual, const char *what) {
    if (!report.errors++) {
        report.bad_gpa = gpa;
        report.bad_expected = expected;
        report.bad_actual = actual;
    }
    publish();
    if (report.errors <= 16) /* then the heartbeat's count has to do */
        put("limosa-guest ERROR gpa=0x%x expected=0x%x actual=0x%x what=%s errors=%u\n", gpa, (u64)expected,
            (u64)actual, what, report.errors);
}

/* Gives each page counter 1 and its tag in three places. */
static void fill_pages(u32 address, u32 pages, u32 tag) {
#pragma GCC unroll 8
    for (; pages; pages--, address += PAGE, tag += TAG_STEP) {
        volatile u32 *page = (void *)address;
        page[0] = 1;
        page[1] = page[512] = page[1023] = tag;
    }
}

static void next_chunk(void) {
    if (report.position == report.ws.pages) {
        report.passes++;
        report.position = 0;
    }
    chunk_pages = 1u << (31 - __builtin_clz((u32)report.ws.pages - report.position));
    chunk_base = (u32)report.ws.base + report.position * PAGE;
    chunk_end = report.position + chunk_pages;
    chunk_x = 0;
}

/* Raises the counters of the next pages of the pass and proves that each was what it had to be. Inlined and unrolled
   since emulation is paid by the instruction: 5 a page. */
static inline __attribute__((always_inline)) void write_pages(u32 pages, u32 factor, u32 stride) {
    u32 x = chunk_x, base = chunk_base, old = (u32)report.passes + 1, new = old + 1, mask = chunk_pages * PAGE - 1;
#pragma GCC unroll 8
    for (; pages; pages--) {
        x = (x * factor + stride) & mask;
        volatile u32 *counter = (void *)(base + x);
        if (__builtin_expect(*counter != old, 0))
            bad((u32)counter, old, *counter, "counter");
        *counter = new;
    }
    chunk_x = x;
}

/* Writes what the rate allows; returns how many pages. */
static u32 write_batch(u64 elapsed_us) {
    credit = rate == ALL ? CREDIT_MAX : min64(credit + min64(elapsed_us, 100000) * rate, CREDIT_MAX);
    u32 pages = min64(min64(credit >> 32, BATCH), chunk_end - report.position);
    if (report.sequential)
        write_pages(pages, 1, PAGE);
    else
        write_pages(pages, 5, STRIDE * PAGE);
    credit -= (u64)pages << 32;
    report.position += pages;
    report.written += pages;
    report.counters_sum += pages;
    if (report.position == chunk_end)
        next_chunk();
    return pages;
}

/* Looks at some pages from number *at of a range on: their tags in all places, and a counter from low to low + spread.
   A bad tag is put right, so that it counts once. Returns 1 at the end of the range. */
static u32 walk(const struct range *range, u32 *at, u32 pages, u32 low, u32 spread) {
    for (; pages && *at < range->pages; pages--, (*at)++) {
        volatile u32 *page = (void *)((u32)range->base + *at * PAGE);
        u32 gpa = (u32)page, tag = gpa / PAGE * TAG_STEP, actual = page[0];
        if (actual - low > spread)
            bad(gpa, low, actual, "walk");
        for (u32 i = 1; i < 1024; i += 511) { /* words 1, 512, 1023 */
            actual = page[i];
            if (actual != tag) {
                bad(gpa + 4 * i, tag, actual, "tag");
                page[i] = tag;
            }
        }
    }
    u32 end = *at == range->pages;
    *at = end ? 0 : *at;
    return end;
}

/* Fills the pages above 4 GiB, GiB by GiB, each shown at 0x40000000 meanwhile: by long mode's page tables (2 MiB pages)
   with 32-bit code in compatibility mode, since KVM over PVM refuses CR0.PG without long mode. Paging is not left on,
   since walking tables makes an emulated guest slow. */
static void fill_high(void) {
    static u64 tables[4][512] __attribute__((aligned(4096)));
    tables[0][0] = (u32)tables[1] | 3; /* present and writable; 0x80 below: 2 MiB */
    tables[1][0] = (u32)tables[2] | 3;
    tables[1][1] = (u32)tables[3] | 3;
    for (u64 done = 0, part; done < report.high.pages; done += part) {
        u64 number = report.high.base / PAGE + done, in_window = number % 0x40000;
        part = min64(report.high.pages - done, 0x40000 - in_window);
        for (u64 i = 0; i < 512; i++) {
            tables[2][i] = i << 21 | 0x83; /* the first GiB, where the guest itself is */
            tables[3][i] = ((number - in_window) * PAGE + (i << 21)) | 0x83;
        }
        __asm__ volatile("movl %%cr4, %%eax; orl $0x20, %%eax; movl %%eax, %%cr4; movl %0, %%cr3;"
                         "movl $0xc0000080, %%ecx; rdmsr; orl $0x100, %%eax; wrmsr;"
                         "movl %%cr0, %%eax; btsl $31, %%eax; movl %%eax, %%cr0; jmp 1f; 1:"
                         : : "r"(tables) : "eax", "ecx", "edx", "memory");
        fill_pages(0x40000000 + (u32)in_window * PAGE, part, (u32)number * TAG_STEP);
        __asm__ volatile("movl %%cr0, %%eax; btrl $31, %%eax; movl %%eax, %%cr0; jmp 1f; 1:" : : : "eax", "memory");
    }
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
    fill_pages(LOW_START, report.ws.pages + report.low.pages, LOW_START / PAGE * TAG_STEP);
    fill_high();
}

static void run(void) {
    u32 ws_at = 0, low_at = 0;
    u64 last = clock_us(), slow = last, beat = last, gap_max = 0, period = config.heartbeat_ms * 1000;
    for (;;) {
        u64 now = clock_us(), gap = now - last;
        last = now;
        gap_max = max64(gap_max, gap); /* since the last heartbeat */
        report.gap_us_max = max64(report.gap_us_max, gap);
        u32 sending = console_poll(), busy = write_batch(gap) | net_poll() | sending;
        u32 due = period && now - beat >= period && !sending; /* a late heartbeat rather than old figures in a queue */
        report.verified += walk(&report.ws, &ws_at, 9, (u32)report.passes + 1, report.position > 0);
        walk(&report.low, &low_at, 8, 1, 0);
        if (due || now - slow >= 10000) {
            slow = report.uptime_us = now;
            clock_check();
            console_input();
        }
        if (due) {
            beat = now - beat < 2 * period ? beat + period : now;
            report.heartbeats++;
            put("limosa-guest heartbeat n=%l up_us=%l gap_us=%l gap_us_max=%l written=%l sum=%l passes=%l verified=%l "
                "errors=%u bad=0x%x rx=%l tx=%l backwards=%u kvmclock_ns=%l\n", report.heartbeats, now, gap_max,
                report.gap_us_max, report.written, report.counters_sum, report.passes, report.verified, report.errors,
                report.bad_gpa, report.rx_packets, report.tx_packets, report.clock_backwards, report.kvmclock_ns);
            gap_max = 0;
        }
        publish();
        if (!busy)
            clock_sleep();
    }
}

void guest_main(u32 start_info, u32 boot_params) {
    __builtin_memcpy(report_page, "LIMOSAG1\1\0\0\0", 12); /* and version */
    publish();
    machine_init(start_info, boot_params);
    place();
    next_chunk();
    u64 pages_a_second = config.dirty / PAGE;
    rate = pages_a_second >= 1000000 ? ALL : div64(pages_a_second << 32, 1000000);
    report.state = RUNNING;
    publish();
    u32 ip = report.ip;
    put("limosa-guest ready version=1 ws_base=0x%x ws_pages=%l low_pages=%l high_pages=%l dirty=%l pattern=%s "
        "tsc_khz=%u fill_us=%l ip=%u.%u.%u.%u net=%u\n", report.ws.base, report.ws.pages, report.low.pages,
        report.high.pages, config.dirty, report.sequential ? "sequential" : "random", report.tsc_khz, clock_us(),
        ip >> 24, ip >> 16 & 255, ip >> 8 & 255, ip & 255, report.net);
    run();
}
