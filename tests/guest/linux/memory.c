/* The memory writer: it owns some MiB, rewrites its pages over and over, and proves each page before it rewrites it. The books (one
 * counter a page, and their sum) lie in memory too, so that a stale page and stale books do not agree. */
#include "inside.h"

#include <stdlib.h>
#include <sys/mman.h>

void page_fill(uint64_t *page, uint64_t number, uint64_t counter) {
    uint64_t seed = hash(number, counter);
    page[0] = PAGE_MAGIC;
    page[1] = number;
    page[2] = counter;
    page[3] = seed;
    for (uint64_t i = 4; i < PAGE_WORDS; i++)
        page[i] = word_of(seed, i);
}

bool page_is(const uint64_t *page, uint64_t number, uint64_t counter) {
    uint64_t seed = hash(number, counter), wrong = page[0] ^ PAGE_MAGIC;
    wrong |= (page[1] ^ number) | (page[2] ^ counter) | (page[3] ^ seed);
    for (uint64_t i = 4; i < PAGE_WORDS; i++)
        wrong |= page[i] ^ word_of(seed, i);
    return wrong == 0;
}

void *memory_writer(void *argument) {
    const struct memory_work *work = argument;
    uint64_t pages = work->mib << 8, sum = 0;
    uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *books = calloc(pages, sizeof *books);
    if (memory == MAP_FAILED || !books) {
        say("limosa-linux failed: no %llu MiB for the memory writer", (unsigned long long)work->mib);
        figures.memory_errors++;
        return NULL;
    }
    for (uint64_t page = 0; page < pages; page++)
        page_fill(memory + page * PAGE_WORDS, page, 0);
    uint64_t start = now_ns(1), written = 0;
    for (uint64_t page = 0;;) {
        uint64_t due = (now_ns(1) - start) / 1000000u * work->pages_per_second / 1000u;
        /* After a pause of the guest the missed work is not made up for. */
        if (due > written + work->pages_per_second / 4u) {
            start += (due - written) * 1000000000u / work->pages_per_second;
            due = written + 8;
        }
        for (; written < due; written++) {
            uint64_t *words = memory + page * PAGE_WORDS;
            if (!page_is(words, page, books[page])) {
                if (figures.memory_errors++ < 8)
                    say("limosa-linux bad page %llu: it is of page %llu, writing %llu, and should be of writing %u", (unsigned long long)page,
                        (unsigned long long)words[1], (unsigned long long)words[2], books[page]);
            }
            page_fill(words, page, ++books[page]);
            sum++;
            figures.memory_written++;
            if (++page == pages) {
                uint64_t all = 0;
                for (page = 0; page < pages; page++)
                    all += books[page];
                if (all != sum) {
                    figures.memory_errors++;
                    say("limosa-linux bad books: the counters add up to %llu, not to %llu", (unsigned long long)all, (unsigned long long)sum);
                }
                figures.memory_walks++;
                page = 0;
            }
        }
        sleep_ms(10);
    }
}
