/* What the program inside a stock Linux guest of the lab is made of: work whose every page, block and byte can be proven right, and
 * figures of it. It is the guest's first process, a user of the kernel like any other; it knows nothing of migrations. */
#ifndef INSIDE_H
#define INSIDE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 8u)
/* "LIMOSAPG" */
#define PAGE_MAGIC 0x475041534f4d494cULL

/* What a heartbeat tells; each figure has one writer. */
struct figures {
    _Atomic uint64_t clock_backwards, clock_gap_ms_max;
    _Atomic uint64_t memory_written, memory_walks, memory_errors;
    _Atomic uint64_t disk_seq, disk_walks, disk_errors;
    _Atomic uint64_t files_written, files_errors;
    _Atomic uint64_t kernel_warnings;
    _Atomic uint64_t bytes_sent, bytes_received, stream_errors;
};
extern struct figures figures;

uint64_t hash(uint64_t a, uint64_t b);
/* Word `index` of the content that `seed` stands for. */
static inline uint64_t word_of(uint64_t seed, uint64_t index) {
    uint64_t word = seed + index * 0x9e3779b97f4a7c15ULL;
    return word ^ (word >> 29);
}
/* A page of `number` as its `counter`th writing leaves it, and whether it is that one. */
void page_fill(uint64_t *page, uint64_t number, uint64_t counter);
bool page_is(const uint64_t *page, uint64_t number, uint64_t counter);

uint64_t now_ns(int clock);
void sleep_ms(uint64_t ms);
/* A line on the console, whole. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void start_thread(void *(*work)(void *), void *argument);

struct memory_work {
    uint64_t mib, pages_per_second;
};
struct disk_work {
    const char *path;
    uint64_t mib, writes_per_second;
};
void *memory_writer(void *memory_work);
void *disk_writer(void *disk_work);
void *file_writer(void *folder);
void *tcp_server(void *unused);

#endif
