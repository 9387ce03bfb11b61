/* virtio-net over virtio-mmio version 2, polled: answers ARP, ICMP echo and UDP echo on port 7, drops all else. */
#include "guest.h"

enum { QUEUE = 32, BUFFER = 2048, HEADER = 12, FRAME_MAX = 1514, RX = 0, TX = 1 };
enum { /* registers of virtio-mmio; 64-bit addresses have their upper half behind the lower */
    FEATURES = 0x20, FEATURES_WORD = 0x24, QUEUE_SELECT = 0x30, QUEUE_MAX = 0x34,
    QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70, DESCRIPTORS = 0x80, MAC = 0x100,
};
struct done { u32 id, length; };
static volatile struct queue {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[QUEUE];
    struct { u16 flags, index, ring[QUEUE], event; } available;
    struct { u16 flags, index; struct done ring[QUEUE]; u16 event; } used __attribute__((aligned(4)));
    u16 seen;
} __attribute__((aligned(16))) queues[2];
static u8 buffers[QUEUE][BUFFER]; /* buffer n is descriptor n of both queues, and belongs to one of them at a time */
static u32 device;

static u32 get(u32 offset) { return *(volatile u32 *)(device + offset); }
static void set(u32 offset, u32 v) { *(volatile u32 *)(device + offset) = v; }
static u32 be16(const u8 *p) { return p[0] << 8 | p[1]; }

/* Hands a buffer to the device. */
static void give(u32 n, u32 id, u32 length) {
    volatile struct queue *q = &queues[n];
    q->descriptors[id].length = length;
    q->available.ring[q->available.index % QUEUE] = id;
    barrier();
    q->available.index++;
    barrier();
    set(NOTIFY, n);
}

/* The next buffer that the device has done with; id QUEUE or more if there is none. */
static struct done take(u32 n) {
    volatile struct queue *q = &queues[n];
    if (q->seen == q->used.index)
        return (struct done){ QUEUE, 0 };
    barrier();
    return q->used.ring[q->seen++ % QUEUE]; /* an id too large is the device's fault: that buffer is lost */
}

static u32 queue_init(u32 n) {
    volatile struct queue *q = &queues[n];
    u32 parts[] = { (u32)q->descriptors, (u32)&q->available, (u32)&q->used };
    for (u32 i = 0; i < QUEUE; i++) {
        q->descriptors[i].address = (u32)buffers[i];
        q->descriptors[i].flags = n == RX ? 2 : 0; /* the device writes */
    }
    q->available.flags = 1; /* no interrupts */
    set(QUEUE_SELECT, n);
    set(QUEUE_SIZE, QUEUE);
    for (u32 i = 0; i < 3; i++) {
        set(DESCRIPTORS + 0x10 * i, parts[i]);
        set(DESCRIPTORS + 0x10 * i + 4, 0);
    }
    set(QUEUE_READY, 1);
    return get(QUEUE_MAX) >= QUEUE;
}

/* Takes the device at an address if it is a modern network device, and the first. */
void net_init(u32 address) {
    volatile u32 *identity = (void *)address; /* magic, version, device */
    if (report.net || identity[0] != 0x74726976 || identity[1] != 2 || identity[2] != 1)
        return;
    device = address;
    set(STATUS, 0);
    set(STATUS, 3); /* acknowledged, driver */
    set(FEATURES_WORD, 0);
    set(FEATURES, 0x20); /* VIRTIO_NET_F_MAC */
    set(FEATURES_WORD, 1);
    set(FEATURES, 1); /* VIRTIO_F_VERSION_1 */
    set(STATUS, 11); /* features chosen */
    if (!(get(STATUS) & 8) || !queue_init(RX) || !queue_init(TX))
        return;
    for (u32 i = 0; i < 6; i++)
        report.mac[i] = *(volatile u8 *)(device + MAC + i);
    set(STATUS, 15); /* driver ready */
    for (u32 i = 0; i < QUEUE; i++)
        give(RX, i, BUFFER);
    report.net = 1;
}

/* Turns a frame of n bytes that deserves an answer into that answer, in place; returns its length, or 0. */
static u32 answer(u8 *f, u32 n) {
    u32 us = __builtin_bswap32(report.ip), *ip = (u32 *)(f + 26), total = be16(f + 16), header = (f[14] & 15) * 4;
    u8 *body = f + 14 + header;
    if (n < 42)
        return 0;
    if (!__builtin_memcmp(f + 12, "\x08\x06\0\x01\x08\0\x06\x04\0\x01", 10) && *(u32 *)(f + 38) == us) { /* ARP */
        f[21] = 2;
        __builtin_memcpy(f + 32, f + 22, 10); /* the sender becomes the target */
        __builtin_memcpy(f + 22, report.mac, 6);
        *(u32 *)(f + 28) = us;
        total = 28;
    } else if (__builtin_memcmp(f, report.mac, 6) || be16(f + 12) != 0x800 || f[14] >> 4 != 4 || header < 20
               || total > n - 14 || total < header + 8 || (be16(f + 20) & 0x3fff) || ip[1] != us) {
        return 0; /* not IPv4 in one piece for us */
    } else {
        if (f[23] == 1 && be16(body) == 0x800) {
            u32 sum = be16(body + 2) + 0x800; /* the type falls by 8, so the sum rises */
            sum += sum >> 16;
            body[0] = 0;
            body[2] = sum >> 8;
            body[3] = sum;
        } else if (f[23] == 17 && be16(body + 2) == 7 && be16(body + 4) >= 8 && be16(body + 4) <= total - header
                   && be16(body) != 7) { /* two echoes would talk for ever */
            *(u32 *)body = *(u32 *)body << 16 | *(u32 *)body >> 16; /* the ports */
        } else {
            return 0;
        }
        ip[1] = ip[0]; /* swapping leaves all checksums right */
        ip[0] = us;
    }
    __builtin_memcpy(f, f + 6, 6);
    __builtin_memcpy(f + 6, report.mac, 6);
    return 14 + total;
}

/* Handles at most 8 frames; returns how many there were. */
u32 net_poll(void) {
    u32 n, count = 0;
    struct done done;
    while (report.net && (done = take(TX)).id < QUEUE)
        give(RX, done.id, BUFFER);
    for (; report.net && count < 8 && (done = take(RX)).id < QUEUE; count++) {
        u8 *frame = buffers[done.id] + HEADER;
        n = done.length > HEADER && done.length <= HEADER + FRAME_MAX ? answer(frame, done.length - HEADER) : 0;
        __builtin_memset(buffers[done.id], 0, HEADER);
        give(n ? TX : RX, done.id, n ? HEADER + n : BUFFER);
        report.rx_packets++;
        report.tx_packets += n > 0;
    }
    return count;
}
