/* virtio-net over virtio-mmio version 2, polled: answers ARP, ICMP echo and UDP echo on port 7. Everything else is dropped. */
#include "guest.h"

enum { QUEUE = 32, BUFFER = 2048, HEADER = 12, FRAME_MAX = 1514, RX = 0, TX = 1 };
enum { /* registers of virtio-mmio; 64-bit addresses have their upper half behind the lower */
    MAGIC = 0, VERSION = 4, DEVICE = 8, FEATURES = 0x10, FEATURES_WORD = 0x14, ACCEPTED = 0x20, ACCEPTED_WORD = 0x24,
    QUEUE_SELECT = 0x30, QUEUE_MAX = 0x34, QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70,
    DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0, MAC = 0x100,
};
struct queue {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[QUEUE];
    struct { u16 flags, index, ring[QUEUE], event; } available;
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; u16 event; } used __attribute__((aligned(4)));
    u16 seen;
} __attribute__((aligned(16)));

static volatile struct queue queues[2];
static u8 buffers[QUEUE][BUFFER]; /* buffer n is descriptor n of both queues, and belongs to one of them at a time */
static u32 device;

static u32 get(u32 offset) { return *(volatile u32 *)(device + offset); }
static void set(u32 offset, u32 v) { *(volatile u32 *)(device + offset) = v; }
static u32 be16(const u8 *p) { return p[0] << 8 | p[1]; }
static u32 be32(const u8 *p) { return be16(p) << 16 | be16(p + 2); }
static void copy(u8 *to, const u8 *from, u32 n) {
    while (n--)
        *to++ = *from++;
}
static void swap(u8 *a, u8 *b, u32 n) {
    for (; n; n--, a++, b++) {
        u8 t = *a;
        *a = *b;
        *b = t;
    }
}

/* Hands a buffer to the device. */
static void give(u32 n, u32 id, u32 length) {
    volatile struct queue *q = &queues[n];
    q->descriptors[id].length = length;
    q->available.ring[q->available.index % QUEUE] = id;
    barrier();
    q->available.index++;
    barrier();
    if (!(q->used.flags & 1))
        set(NOTIFY, n);
}

/* The next buffer that the device has done with, or QUEUE if there is none. */
static u32 take(u32 n, u32 *length) {
    volatile struct queue *q = &queues[n];
    while (q->seen != q->used.index) {
        barrier();
        u32 at = q->seen++ % QUEUE, id = q->used.ring[at].id;
        *length = q->used.ring[at].length;
        if (id < QUEUE)
            return id;
    } /* another id is the device's fault: that buffer is lost */
    return QUEUE;
}

static u32 queue_init(u32 n) {
    volatile struct queue *q = &queues[n];
    set(QUEUE_SELECT, n);
    if (get(QUEUE_MAX) < QUEUE)
        return 0;
    for (u32 i = 0; i < QUEUE; i++) {
        q->descriptors[i].address = (u32)buffers[i];
        q->descriptors[i].flags = n == RX ? 2 : 0; /* the device writes */
    }
    q->available.flags = 1; /* no interrupts */
    set(QUEUE_SIZE, QUEUE);
    set(DESCRIPTORS, (u32)q->descriptors);
    set(AVAILABLE, (u32)&q->available);
    set(USED, (u32)&q->used);
    for (u32 offset = DESCRIPTORS; offset <= USED; offset += 0x10)
        set(offset + 4, 0);
    set(QUEUE_READY, 1);
    return 1;
}

void net_init(void) {
    u32 i, features[2];
    for (i = 0; i < config.mmio_count; i++) {
        device = config.mmio[i];
        if (get(MAGIC) == 0x74726976 && get(VERSION) == 2 && get(DEVICE) == 1)
            break;
    }
    if (i == config.mmio_count)
        return;
    set(STATUS, 0);
    set(STATUS, 1); /* acknowledged */
    set(STATUS, 3); /* driver */
    for (i = 0; i < 2; i++) { /* VIRTIO_NET_F_MAC is bit 5, VIRTIO_F_VERSION_1 bit 32 */
        set(FEATURES_WORD, i);
        features[i] = get(FEATURES) & (i ? 1 : 0x20);
        set(ACCEPTED_WORD, i);
        set(ACCEPTED, features[i]);
    }
    set(STATUS, 11); /* features accepted */
    if (!features[0] || !features[1] || !(get(STATUS) & 8) || !queue_init(RX) || !queue_init(TX)) {
        set(STATUS, 0x80);
        return;
    }
    for (i = 0; i < 6; i++)
        report.mac[i] = *(volatile u8 *)(device + MAC + i);
    set(STATUS, 15); /* driver ready */
    for (i = 0; i < QUEUE; i++)
        give(RX, i, BUFFER);
    report.net = 1;
}

/* Turns a frame of n bytes that deserves an answer into that answer, in place; returns its length, or 0. */
static u32 answer(u8 *f, u32 n) {
    if (n < 42)
        return 0;
    if (be32(f + 12) == 0x08060001 && be32(f + 16) == 0x08000604 && be16(f + 20) == 1 && be32(f + 38) == report.ip) {
        f[21] = 2;
        swap(f + 22, f + 32, 10); /* the sender becomes the target */
        copy(f + 22, report.mac, 6);
        n = 42;
    } else {
        u32 total = be16(f + 16), header = (f[14] & 15) * 4, i = 0;
        u8 *body = f + 14 + header;
        while (i < 6 && f[i] == report.mac[i])
            i++;
        if (i < 6 || be16(f + 12) != 0x800 || f[14] >> 4 != 4 || header < 20 || total > n - 14 || total < header + 8
            || (be16(f + 20) & 0x3fff) || be32(f + 30) != report.ip)
            return 0;
        if (f[23] == 1 && be16(body) == 0x800) {
            u32 sum = be16(body + 2) + 0x800; /* the type falls by 8, so the sum rises */
            sum = (sum & 0xffff) + (sum >> 16);
            body[0] = 0;
            body[2] = sum >> 8;
            body[3] = sum;
        } else if (f[23] == 17 && be16(body + 2) == 7 && be16(body + 4) >= 8 && be16(body + 4) <= total - header
                   && be16(body) != 7) { /* two echoes would talk for ever */
            swap(body, body + 2, 2); /* leaves the checksum right, as the swap of the addresses does */
        } else {
            return 0;
        }
        swap(f + 26, f + 30, 4);
        n = 14 + total;
    }
    copy(f, f + 6, 6);
    copy(f + 6, report.mac, 6);
    return n;
}

/* Handles at most 8 frames; returns how many there were. */
u32 net_poll(void) {
    u32 id, n, count = 0;
    if (!report.net)
        return 0;
    while ((id = take(TX, &n)) < QUEUE)
        give(RX, id, BUFFER);
    for (; count < 8 && (id = take(RX, &n)) < QUEUE; count++) {
        report.rx_packets++;
        n = n > HEADER && n <= HEADER + FRAME_MAX ? answer(buffers[id] + HEADER, n - HEADER) : 0;
        for (u32 i = 0; n && i < HEADER; i++)
            buffers[id][i] = 0;
        report.tx_packets += n > 0;
        give(n ? TX : RX, id, n ? HEADER + n : BUFFER);
    }
    return count;
}
