/* The disk writers. One writes blocks past every cache (O_DIRECT, O_SYNC) and proves each before it rewrites it: what `disk_seq` counts
 * is on the disk, whatever happens to the machine. The other makes, fills, renames and deletes files, so that a file system's
 * metadata moves. */
#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void broken(const char *what, const char *path, _Atomic uint64_t *errors) {
    if ((*errors)++ < 8)
        say("limosa-linux bad disk: %s %s: %s", what, path, strerror(errno));
}

/* What an earlier life of this guest left: the highest sequence number, and blocks that are not whole. */
static uint64_t survey(int file, uint64_t blocks, uint64_t *books, uint64_t *page) {
    uint64_t highest = 0, torn = 0, found = 0;
    for (uint64_t block = 0; block < blocks; block++) {
        books[block] = 0;
        if (pread(file, page, PAGE_BYTES, (off_t)(block * PAGE_BYTES)) != (ssize_t)PAGE_BYTES || page[0] != PAGE_MAGIC)
            continue;
        if (page_is(page, block, page[2])) {
            books[block] = page[2];
            highest = page[2] > highest ? page[2] : highest;
            found++;
        } else {
            torn++;
        }
    }
    say("limosa-linux disk found=%llu torn=%llu seq=%llu", (unsigned long long)found, (unsigned long long)torn, (unsigned long long)highest);
    return highest;
}

void *disk_writer(void *argument) {
    const struct disk_work *work = argument;
    uint64_t blocks = work->mib << 8, *page = NULL;
    uint64_t *books = calloc(blocks, sizeof *books);
    int file = open(work->path, O_RDWR | O_DIRECT | O_SYNC | O_CLOEXEC);
    if (file < 0 || !books || posix_memalign((void **)&page, PAGE_BYTES, PAGE_BYTES)) {
        broken("open", work->path, &figures.disk_errors);
        return NULL;
    }
    uint64_t seq = survey(file, blocks, books, page);
    for (uint64_t count = 0;; count++) {
        uint64_t block = count % blocks;
        off_t at = (off_t)(block * PAGE_BYTES);
        if (books[block]) {
            if (pread(file, page, PAGE_BYTES, at) != (ssize_t)PAGE_BYTES)
                broken("read", work->path, &figures.disk_errors);
            else if (!page_is(page, block, books[block]) && figures.disk_errors++ < 8)
                say("limosa-linux bad block %llu: it is of writing %llu and should be of %llu", (unsigned long long)block,
                    (unsigned long long)page[2], (unsigned long long)books[block]);
        }
        page_fill(page, block, ++seq);
        if (pwrite(file, page, PAGE_BYTES, at) != (ssize_t)PAGE_BYTES)
            broken("write", work->path, &figures.disk_errors);
        books[block] = seq;
        figures.disk_seq = seq;
        if (block + 1 == blocks)
            figures.disk_walks++;
        sleep_ms(1000u / work->writes_per_second);
    }
}

static bool write_file(const char *path, const uint64_t *page) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool good = file >= 0 && write(file, page, PAGE_BYTES) == (ssize_t)PAGE_BYTES && fsync(file) == 0;
    if (file >= 0)
        close(file);
    return good;
}

void *file_writer(void *argument) {
    const char *folder = argument;
    static uint64_t page[PAGE_WORDS];
    static uint64_t books[16];
    char path[256], fresh[256];
    snprintf(fresh, sizeof fresh, "%s/new", folder);
    for (uint64_t count = 1;; count++) {
        uint64_t number = count % 16u;
        snprintf(path, sizeof path, "%s/file%llu", folder, (unsigned long long)number);
        if (books[number]) {
            int file = open(path, O_RDONLY | O_CLOEXEC);
            if (file < 0 || read(file, page, PAGE_BYTES) != (ssize_t)PAGE_BYTES || !page_is(page, number, books[number]))
                broken("check", path, &figures.files_errors);
            if (file >= 0)
                close(file);
            if (count % 5u == 0 && unlink(path) != 0)
                broken("delete", path, &figures.files_errors);
        }
        page_fill(page, number, count);
        if (!write_file(fresh, page) || rename(fresh, path) != 0)
            broken("write", path, &figures.files_errors);
        books[number] = count;
        figures.files_written++;
        sleep_ms(200);
    }
}
